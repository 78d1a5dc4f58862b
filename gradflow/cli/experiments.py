"""The experiments that ship with the package."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def folder() -> Path | None:
    """Where the shipped specs are: inside an installed package, or in the repository."""
    for candidate in (_PACKAGE / "experiments", _PACKAGE.parent / "experiments"):
        if any(candidate.glob("*.toml")):
            return candidate
    return None


def shipped() -> dict[str, Path]:
    """The specs by name, sorted."""
    found = folder()
    return {path.stem: path for path in sorted(found.glob("*.toml"))} if found else {}


def titles() -> dict[str, str]:
    """The title of each shipped spec by name."""
    return {
        name: str(tomllib.loads(path.read_text("utf-8")).get("title", ""))
        for name, path in shipped().items()
    }


def find(spec: str) -> Path:
    """The file that `spec` means: a path, or the name of a shipped experiment.

    **Raises:** `ValueError` naming what was given and the experiments there are.
    """
    path = Path(spec)
    if path.is_file():
        return path
    known = shipped()
    if spec in known:
        return known[spec]
    if path.is_dir() and (path / "spec.toml").is_file():
        return path / "spec.toml"
    close = difflib.get_close_matches(spec, list(known), n=1)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    raise ValueError(
        f'"{spec}" is neither a file nor a shipped experiment; {hint}'
        f"shipped: {', '.join(known) or 'none'}"
    )
