"""The machine and the versions that a measurement belongs to."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

PACKAGES = (
    "gradflow", "jax", "jaxlib", "diffrax", "equinox", "numpy", "scipy", "numba", "torch",
    "torchsde", "torchdiffeq",
)  # fmt: skip


def processor() -> str:
    """The model of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float | None:
    """The memory of the machine."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def load() -> float:
    """How many processes have been running over the last minute: near 0 on a quiet machine."""
    return round(os.getloadavg()[0], 2)


def versions() -> dict[str, str]:
    """The versions of what takes part."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, object]:
    """Everything about the machine that a reader of the numbers needs."""
    return {
        "processor": processor(),
        "cores": cores(),
        "memory_gib": memory_gib(),
        "load_before": load(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "backend": jax.default_backend(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": versions(),
    }
