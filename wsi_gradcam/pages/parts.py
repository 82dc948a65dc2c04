"""Parts of pages that need nothing else and no script: all that is shown is escaped, unless it is `Html`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Html(str):
    """What is markup already."""

    __slots__ = ()


def document(title: str, style: str, content: str) -> bytes:
    """A whole page."""
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<style>{style}</style>\n</head>\n<body>\n<main>\n{content}</main>\n</body>\n</html>\n"
    )
    return page.encode()


def section(title: str, content: str, anchor: str = "") -> str:
    """A part of a page with its own heading."""
    place = f' id="{escape(anchor)}"' if anchor else ""
    return f"<section{place}><h2>{text(title)}</h2>{content}</section>\n"


def paragraph(content: object) -> str:
    """Some text."""
    return f"<p>{shown(content)}</p>"


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """Names with their values; those without a value are left out."""
    texts = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in pairs}
    rows = (f"<dt>{text(name)}</dt><dd>{shown(value)}</dd>" for name, value in texts.items() if value not in ("", None))
    return f"<dl>{''.join(rows)}</dl>"


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table whose cells know their column's name, which narrow screens show beside them."""
    top = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-name="{text(n)}">{shown(c)}</td>' for n, c in zip(head, line, strict=True))
        + "</tr>"
        for line in lines
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def shown(value: object) -> str:
    """A value as markup."""
    return str(value) if isinstance(value, Html) else text(value)


def text(value: object) -> str:
    """Escaped text; names that are not Unicode are shown as well as they can be."""
    return escape(str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
