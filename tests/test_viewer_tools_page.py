"""The tools of a slide's page in a real browser: annotations over the maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.test_viewer_gallery_page import check
from tests.viewer_browser import SLIDE, at, browser, open_page, out, settled
from tests.viewer_runs import MARKERS, Served, plant_annotations, served, square

TOOL_SIZES = {"small": (1024, 700), "desk": (1440, 900), "large": (2560, 1440)}
Y, X = MARKERS[SLIDE][0]


@pytest.fixture(scope="module")
def server(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    drawn = plant_annotations(tmp_path_factory.mktemp("drawn"), SLIDE, square(Y, X, 300, "stroma"))
    with served(out, annotations=drawn) as found:
        yield found


def looks(page: Page) -> bytes:
    settled(page)
    return page.locator(".screen").first.screenshot()


def resized(page: Page, size: str) -> Page:
    width, height = TOOL_SIZES[size]
    page.set_viewport_size({"width": width, "height": height})
    return page


def test_annotations_are_drawn_by_class_and_toggled(open_page: Callable[..., Page]) -> None:
    page = open_page(at(SLIDE, Y, X, 0.5))
    legend = page.locator(".legend-list")
    expect(legend).to_contain_text("marker")
    expect(legend).to_contain_text("stroma")
    both = looks(page)
    page.locator("[data-class=stroma]").uncheck()
    one = looks(page)
    page.keyboard.press("a")
    none = looks(page)
    expect(page.locator("#annotations-on")).not_to_be_checked()
    assert len({both, one, none}) == 3
    page.wait_for_timeout(300)
    assert "outlines=off%2Cstroma" in page.url
    other = open_page(page.url[page.url.index("#") :])
    expect(other.locator("#annotations-on")).not_to_be_checked()
    expect(other.locator("[data-class=stroma]")).not_to_be_checked()
    page.keyboard.press("a")
    page.locator("[data-class=stroma]").check()
    assert looks(page) == both
    page.keyboard.press("b")
    expect(page.locator(".pane canvas.overlay")).to_have_count(2)


@pytest.mark.parametrize("size", TOOL_SIZES)
def test_agreement_is_beside_and_accessible(open_page: Callable[..., Page], size: str) -> None:
    page = resized(open_page(at(SLIDE, Y, X, 0.5)), size)
    page.locator("#agreement summary").click()
    rows = page.locator("table.agreement").first.locator("tbody tr")
    expect(rows).to_have_count(6)
    expect(rows.first).to_contain_text("gradcam: other")
    expect(page.locator("#agreement")).to_contain_text("Lesions found (FROC), of 2")
    check(page, f"{size}-agreement")
    page.locator("#agreement-class").select_option("stroma")
    expect(page.locator("#agreement")).to_contain_text("Lesions found (FROC), of 1")
