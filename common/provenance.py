"""Where a result came from: git revision and package versions, as plain values for manifests and runs."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess

from common.config import PROJECT_ROOT


def git_sha() -> str | None:
    """The project's commit, with '-dirty' when tracked files differ from it.

    In a container image: the commit that the image was built from (its file GIT_SHA). None elsewhere.
    """
    try:
        sha = _git("rev-parse", "HEAD")
        dirty = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        built_from = PROJECT_ROOT / "GIT_SHA"
        return built_from.read_text().strip() if built_from.is_file() else None
    return sha + ("-dirty" if dirty else "")


def package_versions(names: tuple[str, ...]) -> dict[str, str | None]:
    """Installed versions by distribution name (None when absent), with the Python version."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=PROJECT_ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
