"""Makes viewer.png: `make demo`, then `python docs/images/make_viewer.py demo-output/oral-cancer oral-cancer.tiff`.

With Chromium and playwright installed. Other results and slides may be given.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

from PIL import Image
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
            page.get_by_role("button", name="10×").click()
            page.wait_for_timeout(3000)
            shot = Image.open(io.BytesIO(page.screenshot()))
            shot.quantize(256).save(Path(__file__).with_name("viewer.png"), optimize=True)  # half the bytes
            browser.close()
    finally:
        server.terminate()
        server.wait(20)


if __name__ == "__main__":
    main(*sys.argv[1:])
