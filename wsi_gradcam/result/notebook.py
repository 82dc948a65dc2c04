"""HTML that notebooks show of results."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape


def facts_html(facts: Sequence[tuple[str, str]], picture: bytes | None) -> str:
    """Facts by name, above a PNG."""
    rows = "".join(f"<tr><th>{shown(name)}</th><td>{shown(value)}</td></tr>" for name, value in facts)
    if picture is None:
        return f"<table>{rows}</table>"
    data = b64encode(picture).decode()
    image = f'<img alt="slide and heatmaps" style="max-width:100%" src="data:image/png;base64,{data}">'
    return f"<table>{rows}</table>{image}"


def rows_html(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], left_out: int) -> str:
    """A table with a line above, and one below that says how many rows are left out."""
    lines = ["".join(f"<th>{shown(name)}</th>" for name in head)]
    lines += ["".join(f"<td>{shown(value)}</td>" for value in row) for row in rows]
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    more = f"<p>and {left_out:,} more</p>" if left_out else ""
    return f"<p>{shown(title)}</p><table>{table}</table>{more}"


def shown(text: str) -> str:
    """Text for HTML; file names that are not UTF-8 have surrogates in them."""
    return escape(text.encode("utf-8", "replace").decode())
