"""What the site makes of the program itself: pages of commands and settings, and the project's other pages.

MkDocs calls `on_config`, `on_files` and `on_page_markdown`: mkdocs.yml names this file. Commands come from the parser,
settings from the fields of `Settings`: a flag that is added there is on the site, with the words of its help.
"""

from __future__ import annotations

import argparse
import html
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# Pages that lie elsewhere in the project, by their address in the site.
ELSEWHERE = {
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "models/oral-tumour.md": "wsi_gradcam/models/zoo/oral-tumour.md",
    "models/ihc-dab.md": "wsi_gradcam/models/zoo/ihc-dab.md",
}
NOT_ON_THE_SITE = re.compile(
    r"\[([^\]]+)\]\(((?:\.\./)*(?:Dockerfile|configs/|pipelines/|tests/|wsi_gradcam/)[^)#]*)\)"
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Draw flowcharts here: the script that would do it in the reader's browser lies on another server."""
    fence = {"name": "mermaid", "class": "diagram", "format": draw_flowchart}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that no file in docs/ holds."""
    from mkdocs.structure.files import File

    made = {page: make() for page, make in GENERATED.items()}
    made |= {page: (ROOT / source).read_text(encoding="utf-8") for page, source in ELSEWHERE.items()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Have links between pages of the project lead to their places in the site; name files that are not on it."""
    at = page.file.src_uri
    up = "../" * at.count("/")
    for target, source in ELSEWHERE.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(source)}(#[^)]*)?\)", rf"]({up}{target}\1)", markdown)
    if at in ELSEWHERE:
        markdown = re.sub(r"\]\((?:\.\./)*docs/([^)]+)\)", rf"]({up}\1)", markdown)
    return NOT_ON_THE_SITE.sub(_as_file, markdown)


def _as_file(found: re.Match[str]) -> str:
    """Return the text of a link as the name of a file in the source code."""
    text = found[1]
    return text if text.startswith("`") else f"{text} (`{found[2].replace('../', '')}`)"


# --- commands --------------------------------------------------------------------------------------------------------


def commands_page() -> str:
    """Return the page of all commands and their flags, from the parser."""
    from wsi_gradcam.cli.main import COMMANDS, make_parser

    parser = make_parser(list(COMMANDS))
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    helps = {choice.dest: choice.help for choice in commands._choices_actions}
    lines = [
        "# Commands",
        "",
        "`wsi-gradcam COMMAND --help` says the same in a terminal; this page is made from the same parser.",
        "Exit status: 0 all done, 1 something failed, 2 wrong usage, 130 or 143 after Ctrl-C or SIGTERM.",
        "",
        "| command | what it does |",
        "|---|---|",
        *(f"| [`{name}`](#{name}) | {_cell(helps[name] or '')} |" for name in commands.choices),
        "",
    ]
    for name, command in commands.choices.items():
        lines += [f"## {name}", "", *_command(command)]
    return "\n".join(lines)


def _command(command: argparse.ArgumentParser) -> Iterator[str]:
    usage = " ".join(command.format_usage().removeprefix("usage: ").split())
    yield from ["```", usage, "```", ""]
    if command.description:
        yield from [_plain(command.description), ""]
    for group in command._action_groups:
        actions = [a for a in group._group_actions if a.help != argparse.SUPPRESS and a.dest != "help"]
        if not actions:
            continue
        plain = {"positional arguments": "argument", "options": "flag"}
        title = plain.get(group.title or "options", group.title)
        yield from [f"| {title} | |", "|---|---|"]
        yield from (f"| {_flag(command, action)} | {_cell(_expanded(command, action))} |" for action in actions)
        yield ""
    if command.epilog:
        yield from ["```", *(line.strip() for line in command.epilog.splitlines() if line.startswith(" ")), "```", ""]


def _flag(command: argparse.ArgumentParser, action: argparse.Action) -> str:
    default = action.dest.upper()
    name = ", ".join(action.option_strings) or str(action.metavar or default)
    values = command._get_formatter()._format_args(action, default) if action.nargs != 0 else ""
    return f"`{f'{name} {values}' if action.option_strings and values else name}`".replace("|", "\\|")


def _expanded(command: argparse.ArgumentParser, action: argparse.Action) -> str:
    return command._get_formatter()._expand_help(action) if action.help else ""


def _cell(text: str) -> str:
    """Return text for a cell of a table, with flags and file names as code."""
    text = _plain(text).replace("|", "\\|")
    return re.sub(r"(?<![\w`])(--[a-z][\w-]*)", r"`\1`", text)


def _plain(text: str) -> str:
    """Return text in which nothing is taken for Markdown or HTML."""
    text = re.sub(r"(?<!`)([*_<>\[\]])(?!`)", r"\\\1", " ".join(text.split()))
    return re.sub(r"docs/(\w+)\.md", r"[\1](../\1.md)", text.replace("\\_", "_"))


# --- settings --------------------------------------------------------------------------------------------------------


def settings_page() -> str:
    """Return the page of all settings, from the fields of `Settings`."""
    from wsi_gradcam.run.settings import NOT_IN_IDENTITY, Settings

    lines = [
        "# Settings",
        "",
        "Each setting is a flag of `wsi-gradcam explain` (`-` for `_`), a key of its `--config` file, an option of",
        "`wsi_gradcam.explain` and a field of `wsi_gradcam.Settings`. Unknown names and impossible values are refused.",
        "A run is continued only with the settings that it began with; those marked * are compared slide by slide,",
        "with the plan of a slide-level model, or not at all where they alter no value.",
        "",
        "| setting | values | default | |",
        "|---|---|---|---|",
    ]
    for name, field in Settings.model_fields.items():
        mark = "*" if name in NOT_IN_IDENTITY else ""
        values = _cell(_values(field.annotation))
        text = _cell(re.sub(r"`(\w+)`", r"\1", field.description or ""))
        lines.append(f"| `{name}`{mark} | {values} | {_default(field.default)} | {text} |")
    return "\n".join(lines) + "\n"


def _values(annotation: Any) -> str:
    from wsi_gradcam.cli.flags import _types

    return " or ".join(dict.fromkeys(map(_value, _types(annotation))))


def _value(kind: Any) -> str:
    if isinstance(kind, str):
        return kind
    names = {int: "a whole number", float: "a number", bool: "true, false", str: "text", Path: "a path"}
    if kind in names:
        return names[kind]
    inner = [each for each in getattr(kind, "__args__", ()) if each is not Ellipsis]
    if len(inner) == 2:
        return "a number, or Y,X"
    return "three whole numbers" if len(inner) == 3 else "a list of texts"


def _default(value: Any) -> str:
    if value in (None, (), ""):
        return ""
    return f"`{', '.join(map(str, value)) if isinstance(value, tuple) else str(value).lower()}`"


GENERATED: dict[str, Callable[[], str]] = {
    "reference/commands.md": commands_page,
    "reference/settings.md": settings_page,
}


# --- the picture of the rooms ----------------------------------------------------------------------------------------

BOX_W, BOX_H, GAP_X, GAP_Y = 236, 50, 22, 38
NODE = re.compile(r'^\s*(\w+)\["<b>(.*?)</b><br/>(.*?)"\]\s*$')
EDGE = re.compile(r"^\s*(\w+) --> (\w+)\s*$")


def draw_flowchart(source: str, language: str, css_class: str, options: Any, md: Any, **_: Any) -> str:
    """Return a flowchart of the form in docs/architecture.md as SVG, so that no script has to be fetched to draw it.

    Raises:
        ValueError: a line is neither a box nor an arrow.
    """
    boxes: dict[str, tuple[str, str]] = {}
    arrows: list[tuple[str, str]] = []
    for line in source.splitlines()[1:]:
        if found := NODE.match(line):
            boxes[found[1]] = (found[2], found[3])
        elif found := EDGE.match(line):
            arrows.append((found[1], found[2]))
        elif line.strip():
            raise ValueError(f"no box and no arrow: {line}")
    rows = _rows(boxes, arrows)
    return f'<div class="{css_class}">{_svg(boxes, arrows, rows)}</div>'


def _rows(boxes: Iterable[str], arrows: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Return the boxes in rows, top first: each stands above all that its arrows lead to."""
    depth = dict.fromkeys(boxes, 0)
    for _ in depth:
        for start, end in arrows:
            depth[start] = max(depth[start], depth[end] + 1)
    return [[name for name in depth if depth[name] == row] for row in range(max(depth.values()), -1, -1)]


def _svg(boxes: dict[str, tuple[str, str]], arrows: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    wide = max(map(len, rows)) * (BOX_W + GAP_X)
    places: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        left = (wide - len(row) * (BOX_W + GAP_X) + GAP_X) / 2
        places |= {name: (left + i * (BOX_W + GAP_X), number * (BOX_H + GAP_Y)) for i, name in enumerate(row)}
    drawn = [
        f'<path d="M{places[a][0] + BOX_W / 2} {places[a][1] + BOX_H} L{places[b][0] + BOX_W / 2} {places[b][1]}"/>'
        for a, b in arrows
    ]
    for name, (x, y) in places.items():
        title, text = boxes[name]
        drawn.append(f'<rect x="{x}" y="{y}" width="{BOX_W}" height="{BOX_H}" rx="6"/>')
        drawn.append(f'<text class="name" x="{x + 8}" y="{y + 18}">{html.escape(title)}</text>')
        for line, part in enumerate(_wrapped(text)):
            drawn.append(
                f'<text x="{x + 8}" y="{y + 32 + 13 * line}" style="font-size:10px">{html.escape(part)}</text>'
            )
    high = len(rows) * (BOX_H + GAP_Y) - GAP_Y
    size = f'viewBox="-4 -4 {wide + 8} {high + 8}" role="img" aria-label="Rooms of the package"'
    return f"<svg {size}>{''.join(drawn)}</svg>"


def _wrapped(text: str, most: int = 42) -> list[str]:
    import textwrap

    return textwrap.wrap(text, most)
