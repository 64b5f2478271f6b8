"""How much memory may still be taken: what the system calls available, within a container's or a job's own limit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Bytes of main memory that can be taken without swapping: free ones, and caches that the system gives back."""
    available = psutil.virtual_memory().available
    return max(0, min([available, *_left_of_limits()]))


def _left_of_limits() -> Iterator[int]:
    """What is left of the limit of each control group (version 2) that this process is in."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return
    here = CGROUPS / own
    for folder in [here, *here.parents]:
        if folder != CGROUPS and CGROUPS not in folder.parents:
            return
        try:
            limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        except (OSError, ValueError):  # none, or "max"
            continue
        yield limit - used + _given_back(folder)


def _given_back(folder: Path) -> int:
    """Bytes of a control group's file cache that the system gives back when memory is asked for."""
    try:
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(fields["inactive_file"])
    except (OSError, ValueError, KeyError):
        return 0
