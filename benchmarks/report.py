"""What every result says of itself: how it was made, when, where and from which code."""

from __future__ import annotations

import datetime
import os
import sys
from typing import Any

from common.provenance import git_sha, package_versions


def header(packages: tuple[str, ...], *, device: str = "cpu") -> dict[str, Any]:
    """Command, date, device (the GPU's name, or cpu), cores, versions and revision of the running benchmark."""
    spec = sys.modules["__main__"].__spec__
    return {
        "command": " ".join(["python -m", spec.name if spec else sys.argv[0], *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device_name(device),
        "cores": os.cpu_count(),
        "versions": package_versions(packages),
        "git_sha": git_sha(),
    }


def device_name(device: str) -> str:
    """The GPU's name for cuda or cuda:N, otherwise the name as given."""
    if not device.startswith("cuda"):
        return device
    import torch

    return torch.cuda.get_device_name(device)
