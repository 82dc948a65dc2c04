"""The page at a run's end: all that it says is right, and nothing in it is more than text."""

from __future__ import annotations

import re
from dataclasses import asdict
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runs import ROOT
from wsi_gradcam.results.run_files import folder_name, is_name
from wsi_gradcam.run.report import LISTED, run_page
from wsi_gradcam.run.status import RunStatus

STYLE = (ROOT / "wsi_gradcam/pages/layout.css").read_text(encoding="utf-8")
HOSTILE = """a"b'<script>alert(1)</script>&amp;/x y#?.svs"""
VOID = {"meta", "rect", "br"}


class Page(HTMLParser):
    """Reads a page strictly: tags must match."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(data.decode())
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if "td" in self.open:
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == first)


def status(**changes: Any) -> RunStatus:
    """The status of a run of two slides, changed."""
    worker = {"since_s": 0, "tasks": 4, "patches": 88, "seconds": 30, "waited_s": 2, "model_s": 16, "read_s": 9}
    values: dict[str, Any] = {
        "run": "20260101T000000Z-abc123",
        "state": "finished",
        "cause": "",
        "begun": "2026-01-01T00:00:00Z",
        "updated": "2026-01-01T00:00:20Z",
        "command": "wsi-gradcam explain a --out b",
        "out": "b",
        "model": "tiny",
        "model_digest": "0123456789abcdef",
        "layer": "layer4",
        "engine": "eager float32",
        "targets": ["tumour", "other"],
        "settings": {"method": ["gradcam"], "overlap": 0.5, "layer": None},
        "dashboard": "",
        "elapsed_s": 20.0,
        "slides": {"total": 3, "done": 2, "skipped": 0, "ok": 1, "failed": 1},
        "patches": {"done": 88, "planned": 88, "expected": 88},
        "patches_per_s": 4.4,
        "left_s": None,
        "retries": 0,
        "stages": {"explain": {"tasks": 4, "seconds": 30.0}, "stitch": {"tasks": 1, "seconds": 10.0}},
        "workers": {"node1:7": {**worker, "patches_per_s": 4.4, "model": 0.8, "waiting": 0.1, "reading": 0.45}},
        "throughput": {"width_s": 4.0, "patches": [8, 40, 0, 20, 20]},
        "failures": [{"cause": "no mpp; give --mpp 0.25", "count": 7, "slides": ["c.svs"]}],
        "slowest": [{"slide": "a.svs", "seconds": 19.0, "patches": 88}],
    }
    return RunStatus.from_json({**values, **changes})


def row(name: str, state: str = "ok", error: str = "") -> dict[str, str]:
    return {"id": name, "path": f"/slides/{name}", "status": state, "error": error, "patches": "88", "seconds": "19"}


def test_it_says_what_ran_and_how_it_ended() -> None:
    page = Page(run_page(status(), {"a.svs": row("a.svs"), "c.svs": row("c.svs", "failed", "no mpp")}))
    for text in (
        "tiny (0123456789ab)",
        "tumour, other",
        "gradcam",
        "finished",
        "3 slides in total",
        "1 not done yet",
        "0.5",
    ):
        assert text in re.sub(r"\s+", " ", page.text)
    assert page.row("7") == ["7", "no mpp; give --mpp 0.25", "c.svs ..."]
    assert page.row("explain") == ["explain", "4", "30 s", "75%"]
    assert page.row("node1:7") == ["node1:7", "88", "4.4", "80%", "10%", "45%"]
    assert page.row("a.svs")[1:] == ["88", "19 s"]
    bars = {tag["x"]: tag["height"] for name, tag in page.tags if name == "rect"}
    assert bars == {"0": "20.0", "1": "100.0", "3": "50.0", "4": "50.0"}  # of 2, 10, 0, 5, 5 patches per second
    links = [tag["href"] for name, tag in page.tags if name == "a"]
    assert links == ["./a.svs/overview.png"]  # a slide that failed has no picture


def test_a_stopped_run_says_why_and_what_to_do() -> None:
    page = Page(run_page(status(state="stopped", cause="the disk is full"), {}))
    assert "stopped: the disk is full" in page.text
    assert "same command again" in page.text
    assert "No slide is done yet." in page.text


def test_a_run_without_any_work_has_a_page() -> None:
    nothing: dict[str, Any] = {"stages": {}, "workers": {}, "failures": [], "slowest": []}
    nothing["patches"] = {"done": 0, "planned": 0, "expected": 0}
    empty = status(
        **nothing,
        throughput={"width_s": 1.0, "patches": []},
    )
    page = Page(run_page(empty, {}))
    for text in ("No slide failed.", "No patch was explained.", "Nothing was done.", "No slide was processed."):
        assert text in page.text


def test_a_cause_is_shown_whole_with_how_to_go_on() -> None:
    cause = "the file: mpp; or a part of its name; is missing; give it with --mpp"
    page = Page(run_page(status(failures=[{"cause": cause, "count": 1, "slides": ["c.svs"]}]), {}))
    assert page.row("1") == ["1", cause, "c.svs"]
    assert "run the same command again with --retry-failed" in page.text


def test_an_audit_has_a_page_too() -> None:
    failures = [{"cause": "ValueError: what", "count": 1, "slides": ["c.svs"]}]
    page = Page(run_page(status(work="audit", failures=failures), {"a.svs": row("a.svs")}))
    assert page.row("1") == ["1", "ValueError: what", "c.svs"]
    assert "run the same command again." in page.text  # an audit knows no --retry-failed
    assert ["a.svs", "audited"] in [row[:2] for row in page.rows]
    assert "explained" not in page.text
    links = [attributes["href"] for name, attributes in page.tags if name == "a"]
    assert links == ["./../a.svs/overview.png"]


@given(
    st.one_of(st.sampled_from([HOSTILE, "METRICS.JSON", "audit"]), st.text(min_size=1)),
    st.sampled_from(["ok", "failed", HOSTILE]),
)
def test_names_and_texts_are_nothing_but_text(text: str, state: str) -> None:
    everything = status(
        run=text,
        cause=text,
        model=text,
        targets=[text],
        command=text,
        out=text,
        layer=text,
        state="stopped",
        settings={"method": [text], text: text},
        stages={text: {"tasks": 1, "seconds": 1.0}},
        workers={text: asdict(status().numbers.workers["node1:7"])},
        slowest=[{"slide": text, "seconds": 1.0, "patches": 1}],
        failures=[{"cause": text, "count": 1, "slides": [text]}],
    )
    page = Page(run_page(everything, {text: row(text, state, text)}))
    plain = Page(run_page(status(state="stopped"), {"a.svs": row("a.svs", state)}))
    assert {name for name, _ in page.tags} <= {name for name, _ in plain.tags}
    assert not {key for _, tag in page.tags for key in tag if key.startswith("on")}
    folder = folder_name(text) if is_name(text) else text
    for name, tag in page.tags:
        if name == "a":
            assert (tag["href"] or "").startswith("./")
            assert unquote((tag["href"] or "")[2:]) == f"{folder}/overview.png"


def test_names_that_are_not_unicode_are_shown_and_found() -> None:
    page = Page(run_page(status(), {"a\udcff.svs": row("a\udcff.svs")}))
    assert [tag["href"] for name, tag in page.tags if name == "a"] == ["./a%FF.svs/overview.png"]


def test_it_needs_nothing_else() -> None:
    data = run_page(status(), {"a.svs": row("a.svs")}).decode()
    assert "<script" not in data
    assert not re.findall(r"(?:src|href)=\"(?!\./)", data)
    assert "url(" not in STYLE
    assert "@import" not in STYLE
    assert "default-src 'none'" in data


def test_a_large_archive_has_a_page_of_bounded_size() -> None:
    rows = {f"{i:06d}.svs": row(f"{i:06d}.svs") for i in range(20 * LISTED)}
    data = run_page(status(), rows)
    assert len(data) < 400 * LISTED + 20_000
    assert f"The first {LISTED:,} of {20 * LISTED:,}" in data.decode()


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb, by WCAG 2.2."""
    digits = colour.lstrip("#")
    digits = "".join(c * 2 for c in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(
    ("text", "ground", "least"),
    [
        ("#1b1f24", "#fff", 7),
        ("#4b535d", "#fff", 4.5),
        ("#0b4f1d", "#d8f0dd", 4.5),
        ("#7d1508", "#fde3df", 4.5),
        ("#14458a", "#fff", 4.5),
        ("#2b5fa8", "#e4e7eb", 3),
        ("#2b5fa8", "#f0f2f5", 3),
    ],
)
def test_contrast_is_enough_for_everybody(text: str, ground: str, least: float) -> None:
    assert text in STYLE
    assert ground in STYLE
    assert contrast(text, ground) >= least


def test_colours_are_those_that_were_measured() -> None:
    assert set(re.findall(r"#[0-9a-f]{3,6}", STYLE)) == {
        "#f5f6f8",
        "#1b1f24",
        "#fff",
        "#d5d9df",
        "#d8f0dd",
        "#0b4f1d",
        "#fde3df",
        "#7d1508",
        "#4b535d",
        "#e4e7eb",
        "#2b5fa8",
        "#f0f2f5",
        "#14458a",
    }
