"""The site of the documentation builds without a warning, names each page and public name, and asks no server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import wsi_gradcam
from docs import site_hooks
from tests.house import ROOT
from wsi_gradcam.cli.main import COMMANDS
from wsi_gradcam.run.settings import Settings

DOCS = ROOT / "docs"
# What a browser would fetch on its own: not where a reader may click.
FETCHED = re.compile(r"""(?:<(?:script|img|iframe|source)[^>]*\ssrc|<link[^>]*\shref)=["']?((?:https?:)?//[^"' >]+)""")


def pages(nav: Any) -> Iterator[str]:
    """The pages of a navigation, whatever it is nested in."""
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from pages(part)


def test_the_navigation_names_every_page() -> None:
    named = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    made = {*site_hooks.ELSEWHERE, *site_hooks.GENERATED}
    assert len(named) == len(set(named))
    assert set(named) == written | made


def test_every_public_name_has_an_entry_in_the_reference() -> None:
    text = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    entries = {entry.rpartition(".")[2] for entry in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    assert {name for name in wsi_gradcam.__all__ if not name.startswith("__")} <= entries


def test_commands_and_settings_are_told_with_the_words_of_their_help() -> None:
    commands, settings = site_hooks.commands_page(), site_hooks.settings_page()
    for name in COMMANDS:
        assert f"\n## {name}\n" in commands
    explain = commands.partition("\n## explain\n")[2].partition("\n## ")[0]
    for name, field in Settings.model_fields.items():
        assert f"`--{name.replace('_', '-')}" in explain
        row = next(line for line in settings.splitlines() if line.startswith(f"| `{name}`"))
        assert len(re.findall(r"(?<!\\)\|", row)) == 5, row
        assert (field.description or "").split("`")[0].split(":")[0].split("_")[0].rstrip() in row.replace("\\", "")


def test_links_of_the_readme_lead_to_files() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / name).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{name}: {target}"


def test_a_flowchart_is_drawn_with_every_box_above_what_it_uses() -> None:
    source = 'flowchart BT\n    a["<b>low</b><br/>first"]\n    b["<b>high</b><br/>a & b"]\n    b --> a\n'
    drawn = site_hooks.draw_flowchart(source, "mermaid", "diagram", {}, None)
    assert "a &amp; b" in drawn
    heights = {name: float(re.search(rf'y="([\d.]+)">{name}', drawn)[1]) for name in ("low", "high")}  # type: ignore[index]
    assert heights["high"] < heights["low"]
    with pytest.raises(ValueError, match="no box and no arrow"):
        site_hooks.draw_flowchart("flowchart BT\n  nonsense\n", "mermaid", "diagram", {}, None)


def test_the_site_builds_strictly_and_asks_no_other_server(tmp_path: Path) -> None:
    """Links, anchors and docstrings are checked by the build; what a page would fetch, here."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = sorted((tmp_path / "site").rglob("*.html"))
    assert len(made) > 20
    assert not {page.name: found for page in made if (found := FETCHED.findall(page.read_text(encoding="utf-8")))}
    styles = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.css"))
    assert not re.findall(r"url\(\s*[\"']?(?:https?:)?//", styles)
    assert (tmp_path / "site" / "search" / "search_index.js").exists()
