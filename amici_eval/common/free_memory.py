"""How much memory this process may still take, and a device has left."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

__all__ = ["available_memory", "free_bytes"]

# what is taken to be free where the system does not tell
_UNKNOWN_BYTES = 2**31
_OWN_GROUPS = Path("/proc/self/cgroup")
# name of the controller, folder, limit, use, and the part of the use that the system gives back when asked; second
# line: older kernels
_CONTAINERS = (
    ("", Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    ("memory", Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory() -> int:
    """Return how many bytes this process may still take, as far as the system tells.

    Notes
    -----
    The least of what the machine has left, of what each control group around the process has left, and of what a limit
    on the process's own addresses (``ulimit -v``) leaves. Measured anew at each call, so that what other processes, or
    other evaluations in this one, have taken by then does not count. Half of the machine's memory where the system does
    not tell what is left, 2 GiB where it tells nothing.
    """
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    if not found:
        try:
            half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (AttributeError, OSError, ValueError):
            half = 0
        found.append(half if half > 0 else _UNKNOWN_BYTES)
    # a container may be allowed less than its machine has
    for controller, root, limit, used, cached in _CONTAINERS:
        for folder in _own_groups(controller, root):
            try:
                spent = int((folder / used).read_text())
                spent -= sum(
                    int(line.split()[1])
                    for line in (folder / "memory.stat").read_text().splitlines()
                    if line.startswith(f"{cached} ")
                )
                found.append(max(0, int((folder / limit).read_text()) - spent))
            except (OSError, ValueError, IndexError):
                continue
    found += _own_limit()
    return min(found)


def _own_groups(controller: str, root: Path) -> list[Path]:
    """Return the folders of the control groups that hold this process, from its own up to the root."""
    try:
        entries = [line.split(":", 2) for line in _OWN_GROUPS.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return [root]
    for entry in entries:
        if len(entry) == 3 and controller in entry[1].split(","):
            own = PurePosixPath(entry[2].lstrip("/"))
            # a group outside of what a container sees
            if ".." not in own.parts:
                return [root / group for group in (own, *own.parents)] if own.parts else [root]
    return [root]


def free_bytes(device: str) -> int | None:
    """Return the bytes that are free on a torch device, or ``None`` where it does not tell."""
    import torch

    kind = torch.device(device).type
    if kind == "cpu":
        return available_memory()
    if kind != "cuda":
        return None
    try:
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    except (AssertionError, RuntimeError):  # no driver, or one that an earlier error has left unusable
        return None


def _own_limit() -> list[int]:
    """Return what a limit on the addresses of this process leaves, if there is one."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return []
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        return [max(0, limit - pages * resource.getpagesize())]
    except (ImportError, AttributeError, OSError, ValueError, IndexError):  # no such limits on Windows
        return []
