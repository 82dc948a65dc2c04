"""`run.html`: what a run did, on one page that needs nothing else and no script. All that it shows is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from wsi_gradcam.pages.parts import Html, document, facts, section, table, text
from wsi_gradcam.pages.style import STYLE
from wsi_gradcam.run.jobs import FAILED
from wsi_gradcam.run.progress import without_path
from wsi_gradcam.run.status import FINISHED, RUNNING
from wsi_gradcam.system.timer import duration

LISTED = 1000  # slides with a line of their own
STATUSES = {"ok": "explained", "no_tissue": "without tissue", FAILED: "failed"}
NO_MEND = "look at the file, and give the same command again with --retry-failed"


def render(status: Mapping[str, Any], rows: Mapping[str, Mapping[str, str]]) -> bytes:
    """The page of a run, from what `status.json` and `slides.csv` hold."""
    parts = [
        _head(status),
        section("Slides", _counts(status)),
        section("What failed", _failures(status["failures"])),
        section("Patches per second", _throughput(status["throughput"], status["elapsed_s"])),
        section("Time by stage", _stages(status["stages"])),
        section("Workers", _workers(status["workers"])),
        section("Slowest slides", _slowest(status["slowest"])),
        section("All slides", _slides(rows)),
        section("Settings", facts(status["settings"].items())),
    ]
    return document(f"Run {status['run']}", STYLE, "".join(parts))


def _head(status: Mapping[str, Any]) -> str:
    end = {FINISHED: "finished", RUNNING: "running"}.get(status["state"], f"stopped: {status['cause']}")
    if failed := status["slides"].get(FAILED, 0):
        end += f"; {failed:,} of {status['slides']['total']:,} slides failed"
    told = {
        "Model": f"{status['model']} ({status['model_digest'][:12]})",
        "Layer": status["layer"],
        "Explained": ", ".join(status["targets"]),
        "Method": ", ".join(status["settings"]["method"]),
        "Computed with": status["engine"],
        "Began": status["begun"],
        "Ended": f"{status['updated']}, after {duration(status['elapsed_s'])}",
        "Results": status["out"],
        "Command": status["command"],
    }
    state = "good" if status["state"] == FINISHED and not status["failures"] else "bad"
    more = "" if status["state"] == FINISHED else "<p>Give the same command again to go on where it stopped.</p>"
    return (
        f'<header><h1>Run {text(status["run"])}</h1><p class="state {state}">{text(end)}</p>{more}'
        f"{facts(told.items())}</header>\n"
    )


def _counts(status: Mapping[str, Any]) -> str:
    slides, patches = status["slides"], status["patches"]
    boxes = {"slides in all": slides["total"]}
    boxes |= {text: slides[name] for name, text in STATUSES.items() if slides.get(name)}
    boxes |= {"not ended": left} if (left := slides["total"] - slides["done"]) else {}
    boxes |= {"had ended before": slides["skipped"]} if slides["skipped"] else {}
    boxes |= {"patches explained": patches["done"]}
    if patches["done"] and status["elapsed_s"]:
        boxes |= {"patches per second": round(patches["done"] / status["elapsed_s"], 1)}
    items = "".join(f"<li><strong>{value:,}</strong> {text(name)}</li>" for name, value in boxes.items())
    return f'<ul class="counts">{items}</ul>'


def _failures(causes: Sequence[Mapping[str, Any]]) -> str:
    if not causes:
        return "<p>No slide failed.</p>"
    lines = []
    for cause in causes:
        what, _, mend = cause["cause"].partition("; ")
        names = ", ".join(cause["slides"]) + (" ..." if cause["count"] > len(cause["slides"]) else "")
        lines.append((cause["count"], what, mend or NO_MEND, names))
    return table(("slides", "cause", "mend", "which"), lines)


def _throughput(throughput: Mapping[str, Any], elapsed_s: float) -> str:
    width_s, counts = throughput["width_s"], throughput["patches"]
    if not any(counts):
        return "<p>No patch was explained.</p>"
    last_s = max(1e-9, min(width_s, elapsed_s - width_s * (len(counts) - 1)))  # the last bin is not full
    rates = [count / width_s for count in counts[:-1]] + [counts[-1] / max(last_s, width_s / 2)]
    top = max(rates)
    bars = "".join(
        f'<rect x="{i}" y="{100 - 100 * rate / top:.1f}" width="1.02" height="{100 * rate / top:.1f}"/>'
        for i, rate in enumerate(rates)
        if rate
    )
    said = f"at most {top:.1f} patches per second; {duration(width_s)} a bar"
    return (
        f'<figure><figcaption>{said}</figcaption><svg viewBox="0 0 {len(rates)} 100" preserveAspectRatio="none" '
        f'role="img" aria-label="Patches per second over time, {said}">{bars}</svg>'
        f'<div class="axis"><span>0 s</span><span>{duration(width_s * len(rates))}</span></div></figure>'
    )


def _stages(stages: Mapping[str, Mapping[str, float]]) -> str:
    if not stages:
        return "<p>Nothing was done.</p>"
    total = sum(stage["seconds"] for stage in stages.values()) or 1e-9
    ordered = sorted(stages.items(), key=lambda item: -item[1]["seconds"])
    lines = [
        (name, f"{stage['tasks']:,}", duration(stage["seconds"]), _bar(stage["seconds"] / total))
        for name, stage in ordered
    ]
    return table(("stage", "tasks", "time of all workers", "share"), lines)


def _workers(workers: Mapping[str, Mapping[str, float]]) -> str:
    if not workers:
        return "<p>No worker did anything.</p>"
    lines = [
        (
            name,
            f"{w['patches']:,}",
            f"{w['patches_per_s']:.1f}",
            _bar(w["model"]),
            _bar(w["waiting"]),
            _bar(w["reading"]),
        )
        for name, w in sorted(workers.items())
    ]
    note = (
        "<p>Shares of the time from a worker's first task on: the model worked; it waited for pixels; the threads that "
        "read slides were busy.</p>"
    )
    return note + table(("worker", "patches", "patches/s", "model", "waiting", "reading"), lines)


def _slowest(slides: Sequence[Mapping[str, Any]]) -> str:
    if not slides:
        return "<p>No slide was worked on.</p>"
    lines = [(slide["slide"], f"{slide['patches']:,}", duration(slide["seconds"])) for slide in slides]
    return table(("slide", "patches", "time from plan to end"), lines)


def _slides(rows: Mapping[str, Mapping[str, str]]) -> str:
    if not rows:
        return "<p>No slide has ended.</p>"
    chosen = list(rows.items())[:LISTED]
    lines = [
        (
            _link(name, f"{name}/overview.png") if row["status"] != FAILED else name,
            _word(STATUSES.get(row["status"], row["status"])),
            row["patches"],
            without_path(row["error"], row["path"]),
        )
        for name, row in chosen
    ]
    more = f"<p>The first {LISTED:,} of {len(rows):,}; all are in slides.csv.</p>" if len(rows) > LISTED else ""
    return more + table(("slide, with its picture", "status", "patches", "remark"), lines)


def _bar(share: float) -> Html:
    """A share that is drawn."""
    width = f"{min(1.0, max(0.0, share)):.0%}"
    drawn = f'<span class="bar"><span style="width:{width}"></span></span>'
    return Html(f'<span class="share">{drawn}<span class="number">{width}</span></span>')


def _word(word: str) -> Html:
    """A text of one line."""
    return Html(f'<span class="word">{text(word)}</span>')


def _link(name: str, path: str) -> Html:
    """A slide's name that leads to a file beside the page."""
    address = "./" + quote(path.encode("utf-8", "surrogateescape"))  # "./": a name may look like a URL
    return Html(f'<a href="{escape(address)}">{text(name)}</a>')
