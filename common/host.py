"""What the machine has to give to this process."""

from __future__ import annotations

from pathlib import Path


def free_host_bytes() -> int:
    """Memory that this process may still take: what the machine has available, within the limit of its cgroup."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(
        int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")
    )
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return available
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    # File pages are counted as used but are given up when memory is asked for.
    reclaimable = int(stat["active_file"]) + int(stat["inactive_file"])
    used = int((group / "memory.current").read_text()) - reclaimable
    return min(available, int(limit.read_text()) - used)
