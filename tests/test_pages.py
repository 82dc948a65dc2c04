"""Templates: every value is escaped, a missing one is an error, and all of them are in the package."""

from __future__ import annotations

import subprocess
import sys

import jinja2
import pytest

from tests.runs import ROOT
from wsi_gradcam.pages import _environment, render

PACKAGE = ROOT / "wsi_gradcam"
TEMPLATES = sorted(
    path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.html") if "viewer" not in path.parts
)


def test_values_are_escaped() -> None:
    html = render("results/run.html", title="<b>&'\"", rows=[("<i>", "", "", "")], left_out=1234)
    assert "<p>&lt;b&gt;&amp;&#39;&#34;</p>" in html
    assert "<td>&lt;i&gt;</td>" in html
    assert "<p>and 1,234 more</p>" in html


def test_names_that_are_not_unicode_are_shown_as_well_as_they_can_be() -> None:
    html = render("results/run.html", title="a\udcff.svs, \udcc3\udca9.svs", rows=[], left_out=0)
    assert "<p>a\N{REPLACEMENT CHARACTER}.svs, é.svs</p>" in html


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="left_out"):
        render("results/run.html", title="", rows=[])


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_compiles(name: str) -> None:
    _environment().get_template(name)


def test_rendering_alone_imports_jinja() -> None:
    code = (
        "import sys, wsi_gradcam.run.report, wsi_gradcam.pages as t; assert 'jinja2' not in sys.modules;"
        "print(t.render('results/run.html', title='x', rows=[], left_out=0)[:8])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "<p>x</p>", done.stderr
