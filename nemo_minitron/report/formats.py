"""Numbers as people read them. `MISSING` stands for what was not measured; NaN is said, not hidden."""

from __future__ import annotations

import datetime
import math

MISSING = "\u2013"
MINUS = "\u2212"
NO_BREAK = "\u00a0"


def loss(value: float | None) -> str:
    """Nats/token with three decimals."""
    return _finite(value) or f"{value:.3f}".replace("-", MINUS)


def signed(value: float | None) -> str:
    """As `loss`, with the sign always written."""
    return _finite(value) or ("0.000" if abs(round(value or 0, 3)) == 0 else f"{value:+.3f}".replace("-", MINUS))


def perplexity(loss_nats: float | None) -> str:
    """exp(loss): two decimals below 100, whole numbers with separators above, a power of ten far above."""
    if not_finite := _finite(loss_nats):
        return not_finite
    assert loss_nats is not None
    if loss_nats > math.log(1e7):
        return f"10^{loss_nats / math.log(10):.1f}"
    value = math.exp(loss_nats)
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def percent(fraction: float | None, decimals: int = 1) -> str:
    """A fraction as a percentage, without a sign for positive values."""
    return _finite(fraction) or f"{100 * fraction:.{decimals}f}%".replace("-", MINUS)  # type: ignore[operator]


def count(value: float | None) -> str:
    """Three significant digits with k, M, B or T; whole numbers below a thousand."""
    if not_finite := _finite(value):
        return not_finite
    assert value is not None
    if round(abs(value)) < 1000:
        return f"{value:.0f}".replace("-", MINUS)
    for unit, suffix in ((1e3, "k"), (1e6, "M"), (1e9, "B"), (1e12, "T")):
        scaled = value / unit
        digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
        if abs(round(scaled, digits)) < 1000 or suffix == "T":
            break
    return f"{scaled:,.{digits}f}{NO_BREAK}{suffix}".replace("-", MINUS)


def short_count(value: float) -> str:
    """For axis ticks: as `count` without trailing zeros."""
    number, _, suffix = count(value).partition(NO_BREAK)
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return f"{number}{NO_BREAK}{suffix}" if suffix else number


def integer(value: float | None) -> str:
    """A whole number with separators."""
    return _finite(value) or f"{value:,.0f}".replace("-", MINUS)


def duration(seconds: float | None) -> str:
    """Two units at most: 8.4 s, 3 min 12 s, 1 h 04 min, 2 d 03 h."""
    if not_finite := _finite(seconds):
        return not_finite
    assert seconds is not None
    if seconds < 59.95:
        return f"{seconds:.1f}{NO_BREAK}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}{NO_BREAK}min{NO_BREAK}{whole % 60:02d}{NO_BREAK}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}{NO_BREAK}h{NO_BREAK}{minutes % 60:02d}{NO_BREAK}min"
    hours = round(seconds / 3600)
    return f"{hours // 24}{NO_BREAK}d{NO_BREAK}{hours % 24:02d}{NO_BREAK}h"


def moment(unix_seconds: float | None) -> str:
    """A time in UTC to the minute."""
    if not_finite := _finite(unix_seconds):
        return not_finite
    assert unix_seconds is not None
    try:
        when = datetime.datetime.fromtimestamp(unix_seconds, datetime.UTC)
    except (OverflowError, OSError, ValueError):
        return MISSING
    return f"{when:%Y-%m-%d %H:%M} UTC"


def _finite(value: float | None) -> str:
    """The text for a value that is no finite number, else an empty string."""
    if value is None:
        return MISSING
    if math.isnan(value):
        return "NaN"
    return "" if math.isfinite(value) else (f"{MINUS}\u221e" if value < 0 else "\u221e")
