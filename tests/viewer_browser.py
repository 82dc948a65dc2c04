"""A real browser that can reach nothing but the viewer's server, and what tests of its page do with it."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Response, sync_playwright

from tests.runs import ROOT
from tests.viewer_runs import MARKERS, Served, make_run, plant, plant_audit, served

SCREENSHOTS = ROOT / "screenshots"  # looked at by people; not compared
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
SIZES = {"desk": (1440, 900), "tablet": (1024, 768), "phone": (390, 844)}
SMALL = (960, 640)  # enough to work with, and quickly drawn without a graphics card
GREEN, ORANGE = (0, 255, 0), (0xD5, 0x5E, 0x00)
SLIDE = "a.tif"
Pixels = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = make_run(tmp_path_factory.mktemp("page"))
    for slide_id in MARKERS:
        plant(found, slide_id)
    plant_audit(found, SLIDE)
    return found


@pytest.fixture(scope="module")
def server(out: Path) -> Iterator[Served]:
    with served(out) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        assert "CI" not in os.environ, "chromium is not installed, and in CI these tests must run"
        pytest.skip("chromium is not installed; `make browser` does")
    arguments = [
        OFFLINE,
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--force-color-profile=srgb",
    ]
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=arguments)
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Browser, server: Served) -> Iterator[Callable[..., Page]]:
    """Opens the page at an address; whatever goes wrong in it fails the test."""
    problems: list[str] = []
    contexts = []

    def said(message: ConsoleMessage) -> None:
        if message.type == "error":
            problems.append(message.text)

    def answered(answer: Response) -> None:
        if answer.status >= 400:
            problems.append(f"{answer.status} {answer.url}")

    def opened(address: str = "", size: str = "", url: str = server.url, **more: Any) -> Page:
        width, height = SIZES.get(size, SMALL)
        context = browser.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce", **more)
        contexts.append(context)
        page = context.new_page()
        page.on("console", said)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("response", answered)
        page.goto(f"{url}/{address}")
        page.wait_for_selector("body[data-ready]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def settled(page: Page) -> None:
    """Wait until all tiles are there and drawn."""
    page.wait_for_function(
        """() => new Promise((done) => {
            let calm = 0;
            const look = () => {
              calm = document.querySelector(".pane.loading") ? 0 : calm + 1;
              if (calm > 6) done(true); else requestAnimationFrame(look);
            };
            look();
        })"""
    )


def go(page: Page, address: str) -> None:
    """Follow a link on the page."""
    page.evaluate("hash => { delete document.body.dataset.ready; location.hash = hash }", address)
    page.wait_for_selector("body[data-ready]")
    settled(page)


def at(slide: str, y: float, x: float, um: float, layers: str | None = None) -> str:
    """The address of a view."""
    view = "" if layers is None else f"&view={quote(layers)}"
    return f"#slide={quote(slide)}&at={y},{x}&um={um}{view}"


def layer(channel: str = "gradcam: other", colours: str = "orange", opacity: float = 1.0, threshold: str = "") -> str:
    return f"{channel}~on~{colours}~{opacity}~fixed~0..1~{threshold}~full"


def pixels(page: Page, around: Sequence[float] | Pixels, reach: int = 130) -> tuple[Pixels, Pixels]:
    """What is on the screen around a place (y, x) of the first view, RGB, and where its top left corner is."""
    box = page.locator(".screen").first.bounding_box()
    assert box is not None
    top, left = (max(0, round(middle) - reach) for middle in around)
    height, width = min(2 * reach, box["height"] - top), min(2 * reach, box["width"] - left)
    clip: Any = {"x": box["x"] + left, "y": box["y"] + top, "width": width, "height": height}
    image = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    return np.asarray(image, np.float64), np.array((top, left), np.float64)


def centre_of(image: Pixels, colour: tuple[int, int, int]) -> Pixels:
    """The centroid (y, x) of a colour, by how near to it each pixel is."""
    weight = np.clip(1 - np.abs(image - np.array(colour)).max(axis=2) / 90, 0, 1)
    assert weight.sum() > 30, "the marker is not seen"
    rows, columns = np.indices(weight.shape) + 0.5
    centroid: Pixels = np.array([(rows * weight).sum(), (columns * weight).sum()]) / weight.sum()
    return centroid


def control(page: Page, name: str, number: int = 0) -> Locator:
    """A control of a layer; number 0 is the lowest layer."""
    return page.locator(f"#layer-{number} [data-name={name}]")


def enter(field: Locator, text: str) -> None:
    """Type into a field and end."""
    field.fill(text)
    field.press("Enter")


def slide_to(slider: Locator, share: float) -> None:
    """Move a slider."""
    slider.evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')) }", round(1000 * share))
