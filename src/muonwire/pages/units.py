"""Numbers as text: SI prefixes, significant digits, a unit after a no-break space."""

import math

NBSP = "\u00a0"
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def digits_text(value: float, *, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits, thousands separated, never in exponent form above 1e-4."""
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    # Rounded first, since rounding may add a digit: 0.9996 to three digits is 1.00.
    rounded = float(f"{abs(value):.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(rounded)))
    return f"{value:,.{decimals}f}"


def number_text(value: float) -> str:
    """Three digits; powers of ten from a million on."""
    return f"{value:.2e}" if abs(value) >= 1e6 else digits_text(value)


def bytes_text(num_bytes: float) -> str:
    """``1230000`` as ``1.23 MB`` (powers of 1000)."""
    value = float(num_bytes)
    unit = 0
    # 999.5 rounds to four digits, so the next unit starts there.
    while abs(value) >= 999.5 and unit < len(_BYTE_UNITS) - 1:
        value /= 1000
        unit += 1
    return f"{digits_text(value)}{NBSP}{_BYTE_UNITS[unit]}"


def seconds_text(seconds: float) -> str:
    """A duration in the unit that suits it: ``320 ms``, ``4.2 s``, ``3.1 min``, ``2.6 h``, ``1.4 d``."""
    if seconds == 0:
        return f"0{NBSP}s"
    for limit, scale, unit in (
        (0.9995e-3, 1e6, "µs"),
        (0.9995, 1e3, "ms"),
        (120.0, 1.0, "s"),
        (7200.0, 1 / 60, "min"),
        (172800.0, 1 / 3600, "h"),
    ):
        if seconds < limit:
            return f"{digits_text(seconds * scale)}{NBSP}{unit}"
    return f"{digits_text(seconds / 86400)}{NBSP}d"


def duration_unit(longest_s: float) -> tuple[float, str]:
    """Seconds per axis unit and its name, for an axis whose longest value is ``longest_s`` seconds."""
    units = ((1, 1e-3, "ms"), (300, 1.0, "s"), (3 * 3600, 60.0, "minutes"), (3 * 86400, 3600.0, "hours"))
    return next(((per, unit) for limit, per, unit in units if longest_s < limit), (86400.0, "days"))


def loss_text(loss: float) -> str:
    """A loss or a difference of losses: three decimals, or two significant digits below 0.01."""
    return f"{loss:.3f}" if abs(loss) >= 0.01 or loss == 0 else digits_text(loss, digits=2)


def ratio_text(ratio: float) -> str:
    """``96.2`` as ``96×``, ``1.234`` as ``1.2×``."""
    return f"{digits_text(ratio, digits=2 if ratio < 100 else 3)}×"


def lr_text(lr: float) -> str:
    """A learning rate without trailing zeros."""
    return f"{lr:.4g}"


def count_text(count: float) -> str:
    """A count with separated thousands."""
    return f"{count:,.0f}" if float(count).is_integer() else digits_text(count)


def listing_text(names: list[str]) -> str:
    """``a``; ``a and b``; ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def percent_text(share: float) -> str:
    """``0.0123`` as ``1.2 %``, ``0.41`` as ``41 %``."""
    percent = 100 * share
    return f"{percent:.0f}{NBSP}%" if abs(percent) >= 10 else f"{digits_text(percent, digits=2)}{NBSP}%"


def file_slug(text: str) -> str:
    """``text`` as a part of a plain file name.

    >>> file_slug("*_Proj")
    'proj'
    """
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-") or "all"
