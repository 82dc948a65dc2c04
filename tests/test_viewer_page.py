"""The page of a slide in a real browser."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.viewer_browser import (
    GREEN,
    ORANGE,
    SLIDE,
    SMALL,
    at,
    browser,
    centre_of,
    control,
    enter,
    go,
    layer,
    open_page,
    out,
    pixels,
    server,
    settled,
    slide_to,
)
from tests.viewer_runs import MARKERS, MPP


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
    expect(page.locator("#place")).to_have_text("x 301 µm, y 202 µm")
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
    page.wait_for_load_state("networkidle")  # marks and annotations come after the layers, and the panel is drawn again
    slide_to(control(page, "threshold"), 0.001)
    expect(number).not_to_have_value("")
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
