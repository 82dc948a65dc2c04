"""The gallery, and what the page links to and says, in a real browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.viewer_browser import (
    ORANGE,
    SCREENSHOTS,
    SIZES,
    SLIDE,
    at,
    browser,
    centre_of,
    control,
    go,
    layer,
    open_page,
    out,
    pixels,
    server,
    settled,
    slide_to,
)
from tests.viewer_runs import BROKEN, MARKERS, served
from wsi_gradcam.viewer.app import _private_address
from wsi_gradcam.viewer.serve import Access


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
    expect(page.locator("#audit")).to_have_attribute("href", "files/audit/report.html")  # it has no page of its own


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
