"""Exit statuses, and how the program writes to the terminal."""

from __future__ import annotations

import os
import sys

from rich.console import Console

HOLDS, CLAIM_FAILS, BAD_INPUT, BROKEN, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit statuses."""

_PIPE_WIDTH = 120


def console_of(*, quiet: bool = False) -> Console:
    """The terminal, or a pipe as wide as `COLUMNS` says or 120 letters."""
    is_terminal = sys.stdout.isatty()
    width = None if is_terminal or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(quiet=quiet, width=width)
