"""Makes viewer.png: `make demo`, then `wsi-gradcam evidence demo-output/oral-cancer`, then this.

    python docs/images/make_viewer.py demo-output/oral-cancer oral-cancer.tiff demo-output/oral-cancer.geojson

With Chromium and playwright installed. Other results, slides and annotations may be given.
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


def main(out: str, slide: str, annotations: str) -> None:
    """Start the viewer, open a slide with its highest patch and a cluster beside, and keep what is on the screen."""
    command = [sys.executable, "-m", "wsi_gradcam.cli", "view", out, "--port", "0", "--annotations", annotations]
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
            page.keyboard.press("b")
            page.wait_for_timeout(1000)
            page.locator("#layer-0 [data-name=channel]").select_option("clusters of the evidence")
            page.get_by_role("button", name="20×").click()
            page.wait_for_timeout(4000)
            shot = Image.open(io.BytesIO(page.screenshot()))
            shot.quantize(256).save(Path(__file__).with_name("viewer.png"), optimize=True)  # half the bytes
            browser.close()
    finally:
        server.terminate()
        server.wait(20)


if __name__ == "__main__":
    main(*sys.argv[1:])
