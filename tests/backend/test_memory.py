"""How many paths are held at once."""

from pathlib import Path
from typing import Any

import pytest

from gradflow.backend import memory

GIGABYTE = 2**30


class Device:
    """A stand-in for a device of JAX."""

    def __init__(self, platform: str, stats: dict[str, int] | None):
        self.platform = platform
        self._stats = stats

    def memory_stats(self) -> dict[str, int] | None:
        return self._stats


HOST = [Device("cpu", None)] * 2


def accelerators(count: int) -> Any:
    return [Device("gpu", {"bytes_limit": 8 * GIGABYTE, "bytes_in_use": GIGABYTE})] * count


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with 16 GB of memory of which 4 are free."""
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    size = 2**20  # kB in a gigabyte
    text = f"MemTotal:       {16 * size} kB\nMemAvailable:   {4 * size} kB\nHugePages_Total: 0\n"
    (tmp_path / "meminfo").write_text(text)
    return tmp_path


def test_memory_of_the_machine(machine: Path):
    assert memory.host_memory() == 4 * GIGABYTE
    (machine / "meminfo").unlink()
    assert memory.host_memory() > 0


def test_memory_of_a_container(machine: Path):
    (machine / "memory.max").write_text("max\n")
    assert memory.host_memory() == 4 * GIGABYTE
    (machine / "memory.max").write_text(f"{3 * GIGABYTE}\n")
    (machine / "memory.current").write_text(f"{GIGABYTE}\n")
    assert memory.host_memory() == 2 * GIGABYTE
    (machine / "memory.current").write_text(f"{4 * GIGABYTE}\n")
    assert memory.host_memory() == 0


def test_memory_of_devices():
    assert memory.available(HOST) == 4 * GIGABYTE
    assert memory.available(accelerators(3)) == 21 * GIGABYTE


def test_paths_on_a_processor_fit_its_caches():
    assert memory.paths_at_once(32, HOST) == 2**17
    assert memory.paths_at_once(3200, HOST) == 1310
    assert memory.paths_at_once(10**6, HOST) == 256
    assert memory.paths_at_once(64 * 2**20, HOST) == 8  # half of 4 GB, four copies each
    assert memory.paths_at_once(10**12, HOST) == 1


def test_paths_on_an_accelerator_fill_its_memory():
    assert memory.paths_at_once(1024, accelerators(1)) == 7 * GIGABYTE // 8 // 1024
    assert memory.paths_at_once(1024, accelerators(2)) == 14 * GIGABYTE // 8 // 1024
