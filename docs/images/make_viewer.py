"""Makes viewer.png: `python docs/images/make_viewer.py OUT SLIDE`, with Chromium and playwright installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

from playwright.sync_api import sync_playwright


def main(out: str, slide: str) -> None:
    """Start the viewer, open a slide with its highest patch, and keep what is on the screen."""
    command = [sys.executable, "-m", "wsi_gradcam.cli", "view", out, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[0]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1360, "height": 820})
            page.goto(f"{address}#slide={quote(slide)}")
            page.wait_for_selector("body[data-ready]")
            page.keyboard.press("t")
            page.locator(".strip-list button").first.click()
            page.keyboard.press("3")
            page.wait_for_timeout(3000)
            page.screenshot(path=Path(__file__).with_name("viewer.png"))
            browser.close()
    finally:
        server.terminate()
        server.wait(20)


if __name__ == "__main__":
    main(*sys.argv[1:])
