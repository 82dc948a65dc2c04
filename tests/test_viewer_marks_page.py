"""Several windows and processes mark one run at once, and one of its servers is killed meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.runs import ROOT
from tests.test_results_marks import said_in, writer
from tests.viewer_browser import SLIDE, at, browser, open_page, out, server

# Marks one place after the other, as the page does, and keeps in `window.kept` what the server has confirmed.
MARKING = """async ([name, count]) => {
  const server = await import(new URL("page/server.js", document.baseURI).href);
  const { key } = await server.slideNamed("a.tif");
  const outline = [[0, 0], [0, 90], [90, 90]];
  window.kept = [];
  (async () => {
    for (let i = 0; i < count && !window.ended; i += 1) {
      try {
        await server.mark({ slide: key, kind: "note", outline, text: `${name} ${i}`, by: name });
        window.kept.push(`${name} ${i}`);
      } catch {
        break;
      }
    }
    window.ended = true;
  })();
}"""


@pytest.mark.parametrize("marks", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_two_windows_and_two_processes_lose_no_mark(
    browser: Browser, open_page: Callable[..., Page], out: Path, marks: int
) -> None:
    (out / "marks.jsonl").unlink(missing_ok=True)
    command = [sys.executable, "-m", "wsi_gradcam.cli", "view", str(out), "--port", "0"]
    doomed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    processes: list[subprocess.Popen[str]] = []
    try:
        assert doomed.stdout is not None
        address = doomed.stdout.readline().split()[0]
        first = browser.new_context().new_page()  # which may say what it likes when its server dies
        first.goto(f"{address}{at(SLIDE, 700, 900, 0.5, '')}")
        first.wait_for_selector("body[data-ready]")
        second = open_page(at(SLIDE, 700, 900, 0.5, ""))
        processes += [writer(out, name, marks // 3) for name in ("process-1", "process-2")]
        first.evaluate(MARKING, ["window-1", 100_000])
        second.evaluate(MARKING, ["window-2", marks // 4])
        first.wait_for_function(f"() => window.kept.length >= {marks // 8}", timeout=60_000)
        doomed.send_signal(signal.SIGKILL)
        for window in (first, second):
            window.wait_for_function("() => window.ended === true", timeout=60_000)
        confirmed = {*first.evaluate("window.kept"), *second.evaluate("window.kept")}
        for name, process in zip(("process-1", "process-2"), processes, strict=True):
            told, _ = process.communicate(timeout=120)
            confirmed |= {f"{name} {number}" for number in told.split()}
    finally:
        for process in (doomed, *processes):
            process.kill()
            process.communicate(timeout=20)
    assert len(confirmed) >= marks
    said = said_in(out)
    assert confirmed <= set(said)
    assert len(said) == len(set(said)) <= len(confirmed) + 1  # that which was on the disk when the server died
    second.reload()
    expect(second.locator("#marks-title")).to_have_text(f"Marks ({len(said)})")
    first.context.close()
    (out / "marks.jsonl").unlink()
