"""Times as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """A time as people read it.

    >>> duration(59.4), duration(61), duration(7300), duration(200_000)
    ('59 s', '1 min 1 s', '2 h 1 min', '2 d 7 h')
    """
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {name}"
    return f"{whole} s"
