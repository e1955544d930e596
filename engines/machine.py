"""What memory the machine has to give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["available_memory"]

_MEMORY_V1 = "memory"


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take: what the machine has to give, within the limits of its control groups.

    None where the system does not say. What a control group holds of files counts as free: it is given back on demand.

    Args:
        root: of the file system.
    """
    found = [*_machine(root), *_groups(root)]
    return max(0, min(found)) if found else None


def _machine(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _groups(root: Path) -> Iterator[int]:
    """What each control group above this process leaves, of both versions."""
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif _MEMORY_V1 in controllers.split(","):
            top = root / "sys/fs/cgroup" / _MEMORY_V1
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.strip("/")
        # Within a container the path may be that of the host, and is not there: the container's own is the top.
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            limit, taken = (_number(_lines(folder / name)) for name in names[:2])
            if limit is not None and taken is not None:
                cached = [one.split()[1] for one in _lines(folder / "memory.stat") if one.startswith(f"{names[2]} ")]
                yield limit - taken + (_number(cached) or 0)


def _number(lines: Sequence[str]) -> int | None:
    return int(lines[0]) if lines and lines[0].isdecimal() else None  # "max" is no limit


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
