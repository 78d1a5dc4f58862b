"""The folder a study leaves: whole or not there, never a mixture of two studies.

Everything is written to a sibling `NAME.partial-PID` that takes its final name at the end. A study
that was interrupted takes it too, with the status "interrupted", so that what was computed can be
read; but no later study adds to it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from gradflow.backend.whole_file import write_whole

STATUS = "status.json"
_MADE_BY = "gradflow"


class OutputError(ValueError):
    """The output folder cannot be used; the message says what to do."""


class ResultFolder:
    """A result folder that is being written.

    **Arguments:**

    - `out`: the final folder.
    - `overwrite`: replace a former result there.

    **Raises:** `OutputError` if `out` holds anything that may not be replaced.
    """

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        self.out = Path(os.path.abspath(out))
        self.overwrite = overwrite
        check_free(out, overwrite=overwrite)
        self.path = self.out.with_name(f"{self.out.name}.partial-{os.getpid()}")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            for abandoned in abandoned_folders(self.out) if overwrite else ():
                shutil.rmtree(abandoned)
            self.path.mkdir()
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be created ({error.strerror}); choose another --out"
            ) from error
        self.write_status({"status": "running", "pid": os.getpid()})

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file of the folder."""
        path = self.path / name
        write_whole(path, text)
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file of the folder."""
        return self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def write_status(self, status: dict[str, Any]) -> None:
        """Write the file that marks a folder as a result and says how it ended."""
        self.write_json(STATUS, {"made_by": _MADE_BY, **status})

    def publish(self, status: dict[str, Any]) -> Path:
        """Give the folder its final name and return it.

        **Raises:** `OutputError` if another study took the name meanwhile; the results stay under
        their temporary name.
        """
        self.write_status(status)
        try:
            check_free(self.out, overwrite=self.overwrite)
        except OutputError as error:
            raise OutputError(f"{error}\nthe new results are in {self.path}") from None
        former = self.out.with_name(f"{self.out.name}.former-{os.getpid()}")
        if self.out.exists():
            self.out.rename(former)
        self.path.rename(self.out)
        shutil.rmtree(former, ignore_errors=True)
        return self.out

    def discard(self) -> None:
        """Remove everything that was written."""
        shutil.rmtree(self.path, ignore_errors=True)


def check_free(out: Path, *, overwrite: bool = False) -> None:
    """Refuse an output folder that holds something a new study must not touch.

    **Raises:** `OutputError` saying what is there and what to do.
    """
    if out.is_file():
        raise OutputError(f"{out}: is a file; choose another --out")
    if not out.is_dir() or not any(out.iterdir()):
        return
    status = read_status(out)
    if status is None:
        raise OutputError(
            f"{out}: holds files that are not a gradflow result, and --overwrite replaces nothing "
            "else; choose another --out"
        )
    if not overwrite:
        what = {"complete": "a complete result"}.get(status, f"a result with status {status!r}")
        raise OutputError(
            f"{out}: holds {what}; replace it with --overwrite or choose another --out"
        )


def read_status(folder: Path) -> str | None:
    """How a result ended: complete, interrupted, failed or running; None for other folders."""
    try:
        status = json.loads((folder / STATUS).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(status, dict) or status.get("made_by") != _MADE_BY:
        return None
    return str(status.get("status", "unknown"))


def abandoned_folders(out: Path) -> list[Path]:
    """Temporary folders of `out` whose process is gone (killed, or the machine went down)."""
    prefix = f"{out.name}.partial-"
    return [
        path
        for path in sorted(out.parent.iterdir())
        if path.name.startswith(prefix) and not _is_alive(path.name.removeprefix(prefix))
    ]


def _is_alive(pid: str) -> bool:
    if os.name == "nt":  # there, signal 0 is Ctrl-C and not a question
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        return True
    return True
