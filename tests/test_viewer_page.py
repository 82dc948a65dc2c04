"""The page in a real browser that can reach nothing but the server."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Response, expect, sync_playwright

from tests.runs import ROOT
from tests.viewer_runs import BROKEN, MARKERS, MPP, Served, make_run, plant, plant_audit, served
from wsi_gradcam.viewer.security import Access
from wsi_gradcam.viewer.serve import _private_address

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


@pytest.mark.parametrize("slide", MARKERS)
def test_slide_and_overlay_show_a_marker_at_the_same_place(open_page: Callable[..., Page], slide: str) -> None:
    """Within a CSS pixel at five zooms, with pyramids of factors 3 and 7 and of 2 and 4, also at the far corner."""
    page = open_page(at(slide, 500, 500, 1, ""))
    size = page.locator(".screen").first.bounding_box()
    assert size is not None
    for number, screen_px in enumerate((0.6, 0.83, 1.0, 1.4, 2.0)):  # CSS pixels per level-0 pixel
        y, x = MARKERS[slide][number % 2]
        centre = (y + 30 / screen_px, x - 40 / screen_px)  # off the middle, and off the tiles' raster
        expected = np.array((size["height"], size["width"])) / 2 + (np.array((y, x)) - centre) * screen_px
        seen = []
        for layers, colour in (("", GREEN), (layer(threshold="0.5"), ORANGE)):
            go(page, at(slide, *centre, MPP / screen_px, layers))
            image, corner = pixels(page, expected)
            seen.append(corner + centre_of(image, colour))
            np.testing.assert_allclose(seen[-1], expected, atol=1.0)
        np.testing.assert_allclose(seen[0], seen[1], atol=1.0)


def test_each_control_changes_the_view(open_page: Callable[..., Page]) -> None:
    y, x = MARKERS[SLIDE][0]
    page = open_page(at(SLIDE, y, x, 0.25, layer(colours="inferno", opacity=0.7)))
    settled(page)

    def looks() -> bytes:
        settled(page)
        return page.locator(".screen").first.screenshot()

    changes: dict[str, Callable[[], Any]] = {
        "opacity": lambda: slide_to(control(page, "opacity"), 0.2),
        "map": lambda: control(page, "map").select_option("viridis"),
        "fade": lambda: control(page, "fade").click(),
        "threshold": lambda: slide_to(control(page, "threshold"), 0.5),
        "high": lambda: enter(control(page, "high"), "9"),
        "window": lambda: control(page, "window").select_option("slide"),
        "channel": lambda: control(page, "channel").select_option("probability: other"),
        "smooth": lambda: page.locator("[data-name=smooth]").click(),
        "on": lambda: control(page, "on").click(),
    }
    before, address = looks(), page.url
    for name, change in changes.items():
        change()
        page.wait_for_timeout(250)
        after = looks()
        assert after != before, f"{name} changes nothing"
        assert page.url != address or name == "smooth", f"{name} is not in the address"
        before, address = after, page.url
    page.locator("#add-layer").click()
    expect(page.locator(".layer")).to_have_count(2)
    assert looks() != before
    page.get_by_role("button", name="Remove layer 2").click()
    expect(page.locator(".layer")).to_have_count(1)
    enter(control(page, "low"), "99")
    expect(control(page, "low")).to_have_attribute("aria-invalid", "true")


def test_pan_and_zoom_by_mouse_and_keys(open_page: Callable[..., Page]) -> None:
    page = open_page(at(SLIDE, 700, 900, 0.25))

    def view() -> tuple[float, float, float]:
        settled(page)
        page.wait_for_timeout(400)
        values = dict(part.split("=") for part in unquote(page.url.partition("#")[2]).split("&"))
        y, x = map(float, values["at"].split(","))
        return y, x, float(values["um"])

    start = view()
    page.mouse.move(600, 350)
    page.mouse.down()
    page.mouse.move(500, 300, steps=4)
    page.mouse.up()
    moved = view()
    assert moved[:2] == pytest.approx((start[0] + 50, start[1] + 100), abs=8)
    page.mouse.wheel(0, -300)
    assert view()[2] < moved[2]
    page.keyboard.press("4")  # 20x
    assert view()[2] == pytest.approx(0.5, rel=0.01)
    here = view()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    there = view()
    assert there[0] > here[0]
    assert there[1] > here[1]
    page.keyboard.press("+")
    assert view()[2] < there[2]
    page.keyboard.press("0")
    assert view()[:2] == pytest.approx((1501 / 2, 2107 / 2), abs=5)
    page.get_by_role("button", name="40×").click()
    assert view()[2] == pytest.approx(0.25, rel=0.01)


def test_values_a_patch_its_neighbours_and_the_top(open_page: Callable[..., Page]) -> None:
    y, x = MARKERS[SLIDE][0]
    page = open_page(at(SLIDE, y, x, 0.25))
    settled(page)
    box = page.locator(".screen").bounding_box()
    assert box is not None
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(middle[0] + 3, middle[1])
    expect(page.locator("#place")).to_have_text("y 202 µm, x 301 µm")
    expect(page.locator("#values")).to_contain_text("gradcam: other 1 ")
    page.mouse.click(*middle)
    panel = page.locator("#patch")
    expect(panel.locator("h2")).to_contain_text("Patch ")
    expect(panel.locator("table").first).to_contain_text("marker")
    expect(panel.locator(".neighbours button")).to_have_count(8)
    expect(page.locator(".frame")).to_be_visible()
    assert panel.locator(".patch-picture img").evaluate("e => e.decode().then(() => e.naturalWidth)") == 32
    first = panel.locator("h2").text_content()
    panel.get_by_role("button", name="→ E").click()
    expect(panel.locator("h2")).not_to_have_text(first or "")
    panel.locator("#patch-map").select_option("hirescam: marker")
    panel.locator("#patch-overlay").click()
    expect(panel.locator("canvas")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(panel).to_be_hidden()
    page.keyboard.press("t")
    strip = page.locator(".strip-list button")
    expect(strip.first).to_be_visible()
    page.locator("#strip-by").select_option("cam_max_marker")
    page.wait_for_timeout(300)
    values = [float(text) for text in strip.locator("span").all_text_contents()]
    assert values == sorted(values, reverse=True)
    strip.first.click()
    expect(panel.locator("h2")).to_have_text(f"Patch {strip.first.get_attribute('data-patch')}")


def test_a_link_restores_the_view(open_page: Callable[..., Page]) -> None:
    page = open_page(at("inner/b.tif", 480, 320, 0.3, f"{layer()};{layer('probability: marker', 'viridis', 0.3)}"))
    page.keyboard.press("b")
    expect(page.locator(".pane")).to_have_count(2)
    page.mouse.click(600, 400)
    expect(page.locator("#patch h2")).to_contain_text("Patch")
    page.wait_for_timeout(600)
    address = page.url
    other = open_page(address[address.index("#") :])
    expect(other.locator("#title")).to_have_text("inner/b.tif")
    expect(other.locator(".pane")).to_have_count(2)
    expect(other.locator("#patch h2")).to_have_text(page.locator("#patch h2").text_content() or "")
    expect(control(other, "map", 1)).to_have_value("viridis")
    settled(other)
    other.wait_for_timeout(400)
    assert other.url == address


def test_two_views_move_together(open_page: Callable[..., Page]) -> None:
    page = open_page(at(SLIDE, 700, 900, 0.25, ""))
    page.get_by_role("button", name="Side by side").click()
    expect(page.locator(".pane")).to_have_count(2)
    page.mouse.move(600, 450)
    page.mouse.wheel(0, -400)
    page.mouse.down()
    page.mouse.move(520, 400, steps=4)
    page.mouse.up()
    page.wait_for_timeout(500)
    settled(page)
    rulers = page.locator(".ruler-text").all_text_contents()
    assert rulers[0] == rulers[1]
    page.get_by_role("radio", name="right view").check()
    control(page, "on").click()
    settled(page)
    left, right = (np.asarray(Image.open(io.BytesIO(s.screenshot())), np.int16) for s in page.locator(".screen").all())
    inner = (slice(160, -80), slice(20, -200))  # without navigator, legend and scale bar
    width = min(left.shape[1], right.shape[1])
    assert np.median(np.abs(left[:, :width][inner] - right[:, :width][inner])) <= 2


@pytest.mark.parametrize("time", range(8))
def test_two_views_of_a_link_show_the_same_place_however_wide_they_get(
    open_page: Callable[..., Page], time: int
) -> None:
    """Views open and learn their sizes at their own pace; whichever comes last, both show one place."""
    y, x = MARKERS[SLIDE][0]
    beside = f"&beside={quote(layer('gradcam: marker'))}" if time % 2 else ""
    page = open_page(f"{at(SLIDE, y, x, 0.25, layer())}{beside}")
    if not beside:
        page.keyboard.press("b")  # at once
    expect(page.locator(".pane")).to_have_count(2)
    if time % 4 > 1:
        page.locator("#show-layers").click()  # other widths
    page.mouse.move(360 + 80 * time, 300)
    if time > 3:
        page.mouse.wheel(0, -200)
    page.wait_for_timeout(500)
    settled(page)
    places = []
    for screen in page.locator(".screen").all():
        box = screen.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        expect(page.locator("#place")).to_contain_text("µm")
        places.append(page.locator("#place").text_content())
    assert places[0] == places[1]
    rulers = page.locator(".ruler-text").all_text_contents()
    assert rulers[0] == rulers[1]


def test_keys_keep_the_selected_patch_in_view(open_page: Callable[..., Page]) -> None:
    page = open_page(at(SLIDE, 760, 1050, 1.0))
    settled(page)
    screen = page.locator(".screen").bounding_box()
    assert screen is not None
    middle = screen["x"] + screen["width"] / 2, screen["y"] + screen["height"] / 2
    page.mouse.click(middle[0] - 150, middle[1] - 120)  # out of view at 5x the magnification, if the view stayed
    expect(page.locator(".frame")).to_be_visible()
    for key in "54352":
        page.keyboard.press(key)
        page.wait_for_timeout(300)
        frame, screen = page.locator(".frame").bounding_box(), page.locator(".screen").bounding_box()
        assert frame is not None
        assert screen is not None
        place = frame["x"] + frame["width"] / 2 - screen["x"], frame["y"] + frame["height"] / 2 - screen["y"]
        assert 0 < place[0] < screen["width"], key
        assert 0 < place[1] < screen["height"], key


def test_hide_below_begins_at_the_window_and_takes_a_number(open_page: Callable[..., Page]) -> None:
    y, x = MARKERS[SLIDE][0]
    page = open_page(at(SLIDE, y, x, 0.5, "gradcam: other~on~inferno~0.7~fixed~0.25..2~~fade"))
    number = control(page, "threshold-number")
    expect(number).to_have_value("")
    slide_to(control(page, "threshold"), 0.001)
    low = float(number.input_value())
    assert 0.25 < low < 0.27
    enter(number, "0.5")
    expect(page.locator(".legend")).to_contain_text("from 0.5")
    assert float(control(page, "threshold").input_value()) == pytest.approx(1000 * (0.5 - 0.25) / 1.75, abs=1)
    enter(number, "-3")  # any number
    expect(page.locator(".legend")).to_contain_text("from -3")
    slide_to(control(page, "threshold"), 0)
    expect(number).to_have_value("")
    expect(page.locator(".legend")).not_to_contain_text("from")


def test_no_number_is_cut(open_page: Callable[..., Page]) -> None:
    """Neither in a card, whatever its classes are called, nor what is under the pointer, however many channels."""
    page = open_page()
    expect(page.locator(".card dd").first).to_be_visible()
    page.evaluate(
        "document.querySelectorAll('.card dt').forEach(e => { e.textContent = 'invasive ductal carcinoma, G3' })"
    )
    page.evaluate(
        "document.querySelectorAll('.card .facts').forEach(e => e.append(' 123,456 patches, 12,345 unreadable'))"
    )
    cut = """() => [...document.querySelectorAll('.card dd, .card dt, .card .facts')].filter((e) => {
        const card = e.closest('.card').getBoundingClientRect(), own = e.getBoundingClientRect();
        return e.scrollWidth > e.clientWidth + 1 || own.right > card.right || own.bottom > card.bottom;
    }).map((e) => e.textContent)"""
    assert page.evaluate(cut) == []
    y, x = MARKERS[SLIDE][0]
    go(page, at(SLIDE, y, x, 0.5))
    box = page.locator(".screen").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 200, box["y"] + 200)
    expect(page.locator("#values")).to_contain_text("probability: marker")
    page.evaluate("document.getElementById('values').textContent = 'gradcam: marker 0.123 · '.repeat(30)")
    values = page.locator("#values")
    assert values.evaluate("e => e.scrollWidth <= e.clientWidth && e.scrollHeight <= e.clientHeight")
    seen = values.bounding_box()
    assert seen is not None
    assert seen["y"] > 0
    assert seen["y"] + seen["height"] <= SMALL[1]
    after = page.locator(".screen").bounding_box()
    assert after == box  # the view keeps its size


def test_the_gallery_searches_sorts_and_opens(open_page: Callable[..., Page]) -> None:
    page = open_page()
    expect(page.locator(".card")).to_have_count(3)
    expect(page.locator(".card.failed")).to_contain_text(BROKEN)
    expect(page.locator(".card canvas")).to_have_count(2)
    page.locator("#search").fill("inner")
    expect(page.locator(".card")).to_have_count(1)
    page.locator("#search").fill("")
    page.locator("#status").select_option("failed")
    expect(page.locator(".card")).to_have_count(1)
    page.locator("#status").select_option("")
    expect(page.locator(".card")).to_have_count(3)
    page.locator("#sort").select_option("top:marker:down")
    expect(page.locator(".card").last).to_contain_text(BROKEN)  # it has no score
    page.wait_for_timeout(400)
    first, second = page.locator(".card .name").all_text_contents()[:2]
    page.locator(".card a").first.click()
    expect(page.locator("#title")).to_contain_text(first)
    page.keyboard.press("n")
    expect(page.locator("#title")).to_contain_text(second)
    page.keyboard.press("p")
    expect(page.locator("#title")).to_contain_text(first)
    page.keyboard.press("g")
    expect(page.locator("#gallery")).to_be_visible()


def test_a_slide_that_is_gone_shows_its_heatmap_alone(open_page: Callable[..., Page], out: Path) -> None:
    place = out.parent / "slides" / "inner" / "b.tif"
    place.rename(place.with_suffix(".moved"))
    try:
        with served(out) as server:
            page = open_page(at("inner/b.tif", 480, 320, 0.4, layer()), url=server.url)
            expect(page.locator("#notice")).to_contain_text("heatmap is shown alone")
            settled(page)
            box = page.locator(".screen").bounding_box()
            assert box is not None
            image, _ = pixels(page, (box["height"] / 2, box["width"] / 2))
            assert centre_of(image, ORANGE) == pytest.approx(np.array(image.shape[:2]) / 2, abs=1)
            page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            expect(page.locator("#patch .no-picture").first).to_be_visible()
            page.close()
    finally:
        place.with_suffix(".moved").rename(place)


def test_the_report_of_the_run_is_linked(open_page: Callable[..., Page]) -> None:
    page = open_page(at(SLIDE, 700, 900, 0.5))
    with page.expect_popup() as opened:
        page.get_by_role("link", name="Run", exact=True).click()
    expect(opened.value.locator("h1")).to_be_visible()
    opened.value.close()


def test_the_audit_is_linked(open_page: Callable[..., Page]) -> None:
    page = open_page(at(SLIDE, 700, 900, 0.5))
    with page.expect_popup() as opened:
        page.get_by_role("link", name="Audit").click()
    report = opened.value
    expect(report.locator("h1")).to_have_text("audited")
    report.get_by_role("link", name="all").click()
    expect(report.locator("h1")).to_have_text("all audited")
    report.get_by_role("link", name="slide").click()
    expect(report.locator("h1")).to_have_text("audited")
    report.close()
    page.bring_to_front()
    go(page, at("inner/b.tif", 480, 320, 0.4))
    expect(page.locator("#audit")).to_have_attribute("href", "/files/audit/report.html")  # it has no page of its own


def test_where_the_map_is_unsure_is_a_channel(open_page: Callable[..., Page]) -> None:
    page = open_page(at(SLIDE, 751, 1053, 0.5, layer("gradcam: marker", "inferno", 0.7)))
    settled(page)
    control(page, "channel").select_option("spread: marker")
    expect(control(page, "map")).to_have_value("viridis")
    expect(control(page, "window")).to_have_value("slide")
    expect(page.locator(".legend")).to_contain_text("spread: marker (logits)")
    expect(page.locator(".legend")).to_contain_text("patches disagree")
    control(page, "map").select_option("orange")
    slide_to(control(page, "opacity"), 1.0)
    slide_to(control(page, "threshold"), 0.2)
    settled(page)
    box = page.locator(".screen").bounding_box()
    assert box is not None
    middle = box["height"] / 2, box["width"] / 2
    image, corner = pixels(page, middle, 60)
    seam = round(middle[1] - corner[1])  # the spread grows from the left and is known up to the slide's middle
    nearness = np.abs(image - np.array(ORANGE)).max(axis=2)
    assert np.median(nearness[:, seam - 8 : seam - 3]) < np.median(nearness[:, seam + 8 : seam + 13]) - 20
    page.mouse.move(box["x"] + middle[1] - 20, box["y"] + middle[0])
    expect(page.locator("#values")).to_contain_text("spread: marker 0.2")
    page.mouse.move(box["x"] + middle[1] + 20, box["y"] + middle[0])
    expect(page.locator("#values")).to_contain_text("spread: marker –")
    control(page, "channel").select_option("gradcam: marker")
    expect(control(page, "map")).to_have_value("inferno")
    expect(page.locator(".legend")).not_to_contain_text("disagree")


def test_help_lists_the_keys_and_closes(open_page: Callable[..., Page]) -> None:
    page = open_page(at(SLIDE, 700, 900, 0.5))
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("two views side by side")
    page.keyboard.press("b")  # is for the dialog, not for what lies below
    expect(page.locator(".pane")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()


@pytest.mark.parametrize("size", SIZES)
def test_it_is_accessible_and_fits(open_page: Callable[..., Page], size: str) -> None:
    """WCAG 2.1 A and AA by axe-core, nothing wider than the screen; pictures are kept for people."""
    SCREENSHOTS.mkdir(exist_ok=True)
    page = open_page(size=size, has_touch=size == "phone")
    expect(page.locator(".card canvas").first).to_be_visible()
    check(page, f"{size}-gallery")
    y, x = MARKERS[SLIDE][0]
    go(page, at(SLIDE, y, x, 0.5, layer("gradcam: marker", "inferno", 0.7)))
    check(page, f"{size}-slide")
    page.locator("#show-top").click()
    page.locator(".strip-list button").first.click()
    expect(page.locator("#patch h2")).to_be_visible()
    if size != "phone":
        page.locator("#beside").click()
    settled(page)
    check(page, f"{size}-patch")


def check(page: Page, name: str) -> None:
    page.screenshot(path=SCREENSHOTS / f"{name}.png")
    options = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}}
    found = Axe().run(page, options=options).response["violations"]
    problems = [(v["id"], n["target"], n["failureSummary"]) for v in found for n in v["nodes"]]
    assert not problems, json.dumps(problems, indent=1)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_first_picture_is_there_within_a_second(open_page: Callable[..., Page]) -> None:
    page = open_page(at(SLIDE, 700, 900, 0.5))
    page.reload()
    paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
    assert page.evaluate(paint) < 1000


def test_a_browser_opens_the_page_from_its_private_file(browser: Browser, out: Path) -> None:
    """As `view --token --open` does: the file's code is in no address that stays, and the page has its cookie."""
    access = Access.for_host("127.0.0.1", "secret-token")
    with served(out, access) as server, _private_address(f"{server.url}/", access) as file:
        page = browser.new_page()
        page.goto(file)
        page.wait_for_url(f"{server.url}/*")
        expect(page.get_by_text("a.tif").first).to_be_visible()
        assert "token" not in page.url
        again = browser.new_context().new_page()
        again.goto(file)
        expect(again.get_by_text("open the address")).to_be_visible()
        page.close()
        again.close()
