"""Numbers as text: a value with its error, an interval, a duration."""

import math
from collections.abc import Sequence

from gradflow.plot.style import superscript

MISSING = "\u2013"

_NEGLIGIBLE = 1e-6
"""Errors smaller than this, relative to the value, are rounding: the digits are not worth print."""


def with_error(value: float | None, error: float | None) -> str:
    """Writes ``value ± error`` with as many digits as the error supports.

    The error keeps two digits when its three leading digits are 100 to 354, else one; 950 to 999
    round up to 1000 and keep two; the value is rounded at the same place (Particle Data Group,
    Review of Particle Physics, section "Rounding").

    **Arguments:** value and error in the same unit; an error of ``None`` or NaN means "unknown"
    and the value then has four significant digits.

    **Returns:** for example ``0.01252 ± 0.00012`` or ``(1.25 ± 0.03)·10⁻⁵``; ``–`` for a missing
    value.
    """
    if value is None or math.isnan(value):
        return MISSING
    if error is None or not math.isfinite(error) or not math.isfinite(value):
        return number(value)
    error = abs(error)
    if error == 0.0:
        return f"{number(value, 6)} ± 0"
    if error < _NEGLIGIBLE * abs(value):
        return f"{number(value, 6)} ± {number(error, 1)}"
    place = _error_place(error)
    scale = max(_exponent(value), _exponent(error))
    if -4 <= scale < 6 and place >= -8:
        digits = max(0, -place)
        return f"{_signed(round(value, -place), digits)} ± {round(error, -place):.{digits}f}"
    digits = max(0, scale - place)
    unit = 10.0**scale
    body = f"{_signed(value / unit, digits)} ± {error / unit:.{digits}f}"
    return f"({body})·10{superscript(scale)}"


def not_constant(local: Sequence[float]) -> str:
    """Writes a rate that changes along its window."""
    return f"not constant: {arrows(local)}"


def arrows(local: Sequence[float]) -> str:
    """Writes what a rate is in the parts of its window, in order; nothing for none."""
    return " → ".join(number(value, 3) for value in local)


def interval(low: float | None, high: float | None) -> str:
    """Writes ``[low, high]`` with digits that suit its half width; a dash without a bound."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return MISSING
    half = abs(high - low) / 2
    if not math.isfinite(half) or half <= _NEGLIGIBLE * max(abs(low), abs(high)):
        return f"[{number(low, 6)}, {number(high, 6)}]"
    place = _error_place(half)
    scale = max(_exponent(low), _exponent(high))
    if -4 <= scale < 6 and place >= -8:
        digits = max(0, -place)
        return f"[{_signed(round(low, -place), digits)}, {_signed(round(high, -place), digits)}]"
    digits = max(0, scale - place)
    unit = 10.0**scale
    return f"[{_signed(low / unit, digits)}, {_signed(high / unit, digits)}]·10{superscript(scale)}"


def number(value: float | None, digits: int = 4) -> str:
    """Writes a number with ``digits`` significant digits; ``–`` for a missing one."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "\u2212∞"
    exponent = _exponent(value)
    if value == 0.0 or -4 <= exponent < 6:
        text = f"{value:.{digits}g}" if exponent < digits else f"{value:.0f}"
        return text.replace("-", "\u2212")
    mantissa = f"{value / 10.0**exponent:.{digits - 1}f}"
    if mantissa.lstrip("-").startswith("10"):
        exponent += 1
        mantissa = f"{value / 10.0**exponent:.{digits - 1}f}"
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}·10{superscript(exponent)}".replace("-", "\u2212")


def duration(seconds: float | None) -> str:
    """Writes a wall-clock time: ``850 ms``, ``3.2 s``, ``2 min 5 s``, ``1 h 4 min``."""
    if seconds is None or math.isnan(seconds):
        return MISSING
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else -1000


def _error_place(error: float) -> int:
    """Returns the power of ten at which a value with this error is rounded."""
    exponent = _exponent(error)
    leading = round(error / 10.0 ** (exponent - 2))  # 100 to 1000
    if leading < 355:
        return exponent - 1
    return exponent


def _signed(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0.0 else text.replace("-", "\u2212")
