"""Numbers of the audit's report in text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsi_gradcam.audit.schema import ComparisonRow, EstimateRow

BARE = ("0 to 1", "-1 to 1", "ratio", "relative")  # units that say nothing behind a number


def p_text(p: float) -> str:
    """A p as papers give it.

    >>> p_text(0.0341), p_text(1e-9)
    ('p = 0.034', 'p < 0.001')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def value(row: EstimateRow) -> str:
    """An estimate in text."""
    if row.value is None:
        return "no number"
    show = _percent if row.unit == "share" else number
    interval = "" if row.low is None or row.high is None else f" ({show(row.low)} to {show(row.high)})"
    return f"{show(row.value)}{interval}"


def difference(row: ComparisonRow) -> str:
    """A comparison in text."""
    if row.difference is None:
        return "no number"
    if row.unit == "share":
        return f"{_signed(f'{100 * row.difference:+.0f}')} % ({_percent(row.low)} to {_percent(row.high)})"
    better = "" if row.better is None else f", larger in {100 * row.better:.0f} % of the patches"
    unit = "" if row.unit in BARE else f" {row.unit}"
    return f"{_signed(f'{row.difference:+.3g}')}{unit} ({number(row.low)} to {number(row.high)}){better}"


def number(found: float | None) -> str:
    """A number with three digits; a dash for none."""
    return "–" if found is None else _minus(f"{found:.3g}")


def _percent(found: float | None) -> str:
    return "–" if found is None else f"{_minus(f'{100 * found:.0f}')} %"


def _minus(number: str) -> str:
    """A number with a minus sign, and none before zero."""
    return number.lstrip("-") if float(number) == 0 else number.replace("-", "−")


def _signed(number: str) -> str:
    """As `_minus`, of a number that has a plus where it is positive."""
    return "0" if float(number) == 0 else _minus(number)
