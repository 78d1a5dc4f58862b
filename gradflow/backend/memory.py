"""How many paths are held at once."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SHARE = 0.5
"""The part of the memory at hand that the paths held at once may fill."""

COPIES = 4
"""How often a step holds the size of the state: before, after, gradient and partial products."""

CACHED = 2**22
"""Bytes of state and noise that the caches of a processor keep from one step to the next."""

FEWEST = 256
"""Paths held at once whatever the caches keep: fewer cost more for each."""

MEMORY = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")


def paths_at_once(bytes_per_path: int, devices: Iterable[Any]) -> int:
    """The number of paths that are held at once unless the user says so.

    As many as fit into half of the memory at hand; on a processor also no more than its caches
    hold, but at least 256. Measured on two cores with 1 MB of second-level cache each, a step of
    10^6 scalar paths at once takes 1.5 to 2 times as long per path as one of 10^4 to 10^5.

    **Arguments:** `bytes_per_path`: of the state of one path and its random numbers of one step.
    """
    devices = list(devices)
    fitting = int(SHARE * available(devices) / (COPIES * max(bytes_per_path, 1)))
    if devices[0].platform == "cpu":
        fitting = min(fitting, max(CACHED // max(bytes_per_path, 1), FEWEST))
    return max(fitting, 1)


def available(devices: Iterable[Any]) -> int:
    """Bytes of memory at hand on all of the devices together; host devices share the machine's."""
    found = [device.memory_stats() for device in devices]
    if any(stats is None or "bytes_limit" not in stats for stats in found):
        return host_memory()
    return sum(_free(stats) for stats in found)


def host_memory() -> int:
    """Bytes that the machine, or the container this process runs in, has to give."""
    return min(_of_machine(), _of_container())


def _free(stats: Any) -> int:
    return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))


def _of_machine() -> int:
    if MEMORY.exists():
        sizes = dict(line.split(":") for line in MEMORY.read_text().splitlines())
        if "MemAvailable" in sizes:
            return int(sizes["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _of_container() -> int:
    most, now = GROUP / "memory.max", GROUP / "memory.current"
    if not most.exists() or most.read_text().strip() == "max":
        return 2**63
    return max(int(most.read_text()) - int(now.read_text()), 0)


def check_room(arrays: Iterable[Any], devices: Iterable[Any]) -> None:
    """Raise a `MemoryError` if not even one path, of such arrays, finds room for one step."""
    needed = COPIES * sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    there = available(devices)
    if needed > there:
        raise MemoryError(
            f"a step of one path takes {needed / 1e9:.3g} GB, random numbers included, and "
            f"{there / 1e9:.3g} GB are free; use a smaller batch or a smaller network."
        )
