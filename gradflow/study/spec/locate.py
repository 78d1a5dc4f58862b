"""Line numbers of the keys of a TOML text.

`tomllib` gives values without positions. An error in a spec should name its line, so this scanner
walks a text that `tomllib` has already accepted and records where every table, key and array
element starts.
"""

import re
import tomllib

Path = tuple[str | int, ...]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SYNTAX_ERROR_LINE = re.compile(r"\(at line (\d+), column \d+\)")


class Lines:
    """Where the parts of one TOML text start, 1-based."""

    def __init__(self, text: str) -> None:
        self._lines = _Scanner(text).scan()

    def of(self, path: Path) -> int:
        """Line of `path`, or of its nearest ancestor that is written in the text (1 for the root).

        A missing key has no line of its own; the table it is missing from has one.
        """
        for length in range(len(path), 0, -1):
            if path[:length] in self._lines:
                return self._lines[path[:length]]
        return 1


def syntax_error_line(message: str, text: str) -> int:
    """Line named by the message of a `tomllib.TOMLDecodeError`; the last if it names the end."""
    match = _SYNTAX_ERROR_LINE.search(message)
    return int(match[1]) if match else max(1, len(text.rstrip().splitlines()))


class _Scanner:
    """Recursive descent over valid TOML that notes positions and skips values."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Path, int] = {}
        self.table_counts: dict[Path, int] = {}  # [[array of tables]] -> how many so far

    def scan(self) -> dict[Path, int]:
        table: Path = ()
        while self._skip_blank():
            start = self.at
            if self.text[self.at] == "[":
                table = self._header(start)
            else:
                self._pair(table)
        return self.lines

    def _note(self, path: Path, start: int) -> None:
        line = self.text.count("\n", 0, start) + 1
        for length in range(1, len(path) + 1):
            self.lines.setdefault(path[:length], line)

    def _header(self, start: int) -> Path:
        is_array = self.text.startswith("[[", self.at)
        self.at += 2 if is_array else 1
        keys = self._dotted_key()
        self.at += 2 if is_array else 1
        path: Path = ()
        for number, key in enumerate(keys):
            path = (*path, key)
            if is_array and number == len(keys) - 1:
                self.table_counts[path] = self.table_counts.get(path, 0) + 1
            if path in self.table_counts:
                path = (*path, self.table_counts[path] - 1)
        self._note(path, start)
        return path

    def _pair(self, table: Path) -> None:
        start = self.at
        path = (*table, *self._dotted_key())
        self._note(path, start)
        self.at += 1  # the equals sign
        self._value(path)

    def _dotted_key(self) -> tuple[str, ...]:
        keys = []
        while True:
            self._skip_spaces()
            if self.text[self.at] in "\"'":
                start = self.at
                self._string()
                keys.append(_unquoted(self.text[start : self.at]))
            else:
                match = _BARE_KEY.match(self.text, self.at)
                assert match is not None, "the scanner only reads text that tomllib accepted"
                self.at = match.end()
                keys.append(match[0])
            self._skip_spaces()
            if self.text[self.at] != ".":
                return tuple(keys)
            self.at += 1

    def _value(self, path: Path) -> None:
        self._skip_spaces()
        character = self.text[self.at]
        if character == "[":
            self.at += 1
            index = 0
            while self._skip_blank(",") and self.text[self.at] != "]":
                self._note((*path, index), self.at)
                self._value((*path, index))
                index += 1
            self.at += 1
        elif character == "{":
            self.at += 1
            while self._skip_blank(",") and self.text[self.at] != "}":
                self._pair(path)
            self.at += 1
        elif character in "\"'":
            self._string()
        else:
            while self.at < len(self.text) and self.text[self.at] not in ",]}#\r\n":
                self.at += 1

    def _string(self) -> None:
        quote = self.text[self.at]
        is_long = self.text.startswith(quote * 3, self.at)
        end = quote * 3 if is_long else quote
        self.at += len(end)
        while not self.text.startswith(end, self.at):
            self.at += 2 if quote == '"' and self.text[self.at] == "\\" else 1
        self.at += len(end)
        while is_long and self.text.startswith(quote, self.at):  # up to two quotes before the end
            self.at += 1

    def _skip_spaces(self) -> None:
        while self.at < len(self.text) and self.text[self.at] in " \t":
            self.at += 1

    def _skip_blank(self, also: str = "") -> bool:
        """Skip white space, comments and the characters in `also`; False at the end of the text."""
        while self.at < len(self.text):
            if self.text[self.at] == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            elif self.text[self.at] in " \t\r\n" + also:
                self.at += 1
            else:
                return True
        return False


def _unquoted(key: str) -> str:
    if key[0] == "'":
        return key[1:-1]
    return next(iter(tomllib.loads(f"{key} = 0")))
