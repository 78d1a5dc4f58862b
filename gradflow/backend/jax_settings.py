"""What gradflow asks of JAX before it starts: double precision, and a host device a core."""

import os
import sys
from pathlib import Path
from typing import Any

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Where Linux keeps the processor time that a container may use: microseconds, and out of which."""


def set_up_jax() -> None:
    """Set what the user has not set; too late, and without effect, once JAX has begun to compute.

    `GRADFLOW_X64=0` keeps single precision. `GRADFLOW_HOST_DEVICES` is the number of devices that
    the processor is divided into, over which ensembles are spread; default: one a core, unless
    JAX has been told otherwise by `JAX_NUM_CPU_DEVICES`, `jax_num_cpu_devices` or `XLA_FLAGS`.

    **Raises:** `ValueError` for a `GRADFLOW_X64` that is neither 0 nor 1, or a
    `GRADFLOW_HOST_DEVICES` that is not a number >= 1.
    """
    double = os.environ.get("GRADFLOW_X64", "1")
    if double not in ("0", "1"):
        raise ValueError(f"GRADFLOW_X64 must be 1 (double precision) or 0; got {double!r}.")
    if double == "1":
        _set("jax_enable_x64", True)
    count = host_devices()
    if count is None:
        return
    try:
        _set("jax_num_cpu_devices", count)
    except RuntimeError:  # the devices exist already
        return


def host_devices() -> int | None:
    """The number of host devices to ask for; None to leave it as it is.

    **Raises:** `ValueError` for a `GRADFLOW_HOST_DEVICES` that is not a number >= 1.
    """
    asked = os.environ.get("GRADFLOW_HOST_DEVICES")
    if asked is not None:
        if not asked.isdecimal() or int(asked) < 1:
            raise ValueError(f"GRADFLOW_HOST_DEVICES must be an integer >= 1; got {asked!r}.")
        return int(asked)
    jax: Any = sys.modules.get("jax")
    if (
        "JAX_NUM_CPU_DEVICES" in os.environ
        or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
        or (jax is not None and jax.config.jax_num_cpu_devices != -1)
    ):
        return None
    return cores()


def cores() -> int:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = (os.cpu_count() or 1) if affinity is None else len(affinity(0))
    quota, _, period = QUOTA.read_text().partition(" ") if QUOTA.exists() else ("max", "", "")
    return count if quota == "max" else min(count, max(int(quota) // int(period), 1))


def _set(name: str, value: bool | int) -> None:
    """Set an option of JAX, by its environment variable if it is not imported yet."""
    jax: Any = sys.modules.get("jax")
    if jax is None:
        os.environ[name.upper()] = str(int(value))
    else:
        jax.config.update(name, value)
