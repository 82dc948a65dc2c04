"""The tools of a slide's page in a real browser: annotations over the maps."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.test_viewer_gallery_page import check
from tests.viewer_browser import SLIDE, at, browser, open_page, out, settled, slide_to
from tests.viewer_runs import MARKERS, Served, plant_annotations, served, square
from wsi_gradcam.geometry import Region
from wsi_gradcam.results.heatmap import HeatmapStore

TOOL_SIZES = {"small": (1024, 700), "desk": (1440, 900), "large": (2560, 1440)}
EACH_SIZE = ["small", *(pytest.param(name, marks=pytest.mark.slow) for name in ("desk", "large"))]
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


@pytest.mark.parametrize("size", EACH_SIZE)
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


def test_a_patch_and_a_region_are_marked_listed_and_taken_back(open_page: Callable[..., Page], out: Path) -> None:
    (out / "marks.jsonl").unlink(missing_ok=True)
    page = resized(open_page(at(SLIDE, Y, X, 0.5, "")), "small")
    expect(page.locator("#mark-region")).to_be_visible()
    plain = looks(page)
    page.mouse.click(700, 350)
    expect(page.locator("#patch-mark button")).to_have_count(4)
    page.keyboard.press("x")
    marks = page.locator(".mark-list li")
    expect(marks).to_have_count(1)
    expect(marks.first).to_contain_text("Artefact")
    page.locator("#patch-mark [data-kind=note]").click()  # says nothing yet
    expect(marks).to_have_count(1)
    page.locator("#patch-mark-text").fill("a fold")
    page.locator("#patch-mark [data-kind=note]").click()
    expect(marks.first).to_contain_text("a fold")
    page.keyboard.press("Escape")
    page.keyboard.press("m")
    page.mouse.move(500, 300)
    page.mouse.down()
    for x, y in ((600, 290), (620, 400), (480, 390)):
        page.mouse.move(x, y, steps=3)
    page.mouse.up()
    page.locator("#region-mark-text").fill("lymphocytes")
    check(page, "small-marks")
    page.locator("#region-form [data-kind=expected]").click()
    expect(marks).to_have_count(3)
    expect(marks.first).to_contain_text("lymphocytes")
    assert looks(page) != plain
    page.locator(".openseadragon-canvas").first.focus()
    page.keyboard.press("m")
    page.keyboard.press("Enter")  # without a mouse: what the view shows
    page.locator("#region-form [data-kind=unexpected]").click()
    expect(marks).to_have_count(4)
    other = open_page(at(SLIDE, 300, 300, 0.5, ""))  # another window
    expect(other.locator(".mark-list li")).to_have_count(4)
    other.locator(".mark-go", has_text="lymphocytes").click()
    for name in ("Remove mark: lymphocytes, region", "Remove mark: a fold, patch"):
        other.get_by_role("button", name=name).click()
    expect(other.locator(".mark-list li")).to_have_count(2)
    page.reload()
    expect(page.locator(".mark-list li")).to_have_count(2)


def test_two_runs_are_shown_beside_each_other_and_as_a_difference(
    open_page: Callable[..., Page], out: Path, tmp_path: Path
) -> None:
    shutil.copytree(out, tmp_path / "new")
    store = HeatmapStore(tmp_path / "new" / SLIDE / "heatmap.ome.zarr")
    for level, shape in enumerate(store.shapes):
        whole = Region(0, 0, *shape)
        store.write(level, 1, whole, store.read(level, 1, whole)[::-1, ::-1])
    with served(out, second=tmp_path / "new") as both:
        page = resized(open_page(url=both.url), "small")
        expect(page.locator("#title")).to_contain_text("compared with new")
        expect(page.locator(".card").first).to_contain_text("maps disagree", timeout=60_000)
        page.locator("#sort").select_option("difference:maps:down")
        expect(page.locator(".card .name").first).to_have_text(SLIDE)
        check(page, "small-two-runs")
        page.locator(".card a").first.click()
        expect(page.locator(".pane")).to_have_count(2)
        expect(page.locator(".legend").last).to_contain_text("gradcam: marker (new)")
        settled(page)
        left, right = (screen.screenshot() for screen in page.locator(".screen").all())
        assert left != right
        page.locator("#layer-0 [data-name=channel]").select_option("difference: gradcam: marker")
        expect(page.locator(".legend").first).to_contain_text("red is more")
        expect(page.locator("#layer-0 [data-name=map]")).to_have_value("coolwarm")
        check(page, "small-difference")


@pytest.mark.parametrize("size", EACH_SIZE)
def test_the_highest_patches_of_the_archive_lead_to_their_places(open_page: Callable[..., Page], size: str) -> None:
    page = resized(open_page(), size)
    page.keyboard.press("T")
    patches = page.locator("#top-patches a")
    expect(patches.first).to_be_visible(timeout=60_000)
    expect(page.locator("#cards")).to_be_hidden()
    expect(page.locator("#top-found")).to_have_text("of 2 slides", timeout=60_000)
    check(page, f"{size}-archive-top")
    page.locator("#top-class").select_option("other")
    expect(patches.first).to_contain_text("other ")
    title = patches.first.get_attribute("title") or ""
    patches.first.click()
    slide, _, number = title.rpartition(", patch ")
    expect(page.locator("#title")).to_have_text(slide)
    expect(page.locator("#patch h2")).to_have_text(f"Patch {number}")


@pytest.mark.parametrize("size", EACH_SIZE)
def test_tools_change_the_view_and_save_it(open_page: Callable[..., Page], size: str) -> None:
    page = resized(open_page(at(SLIDE, Y, X, 0.5)), size)
    seen = [looks(page)]
    page.locator("#layer-0 [data-name=lines]").select_option("contour")
    seen.append(looks(page))
    page.locator("#layer-0 [data-name=lines]").select_option("isolines alone")
    seen.append(looks(page))
    page.locator("#layer-0 [data-name=lines]").select_option("")
    slide_to(page.locator("#layer-0 [data-name=gamma]"), 0.1)
    seen.append(looks(page))
    page.locator(".openseadragon-canvas").first.focus()
    page.keyboard.press("r")
    seen.append(looks(page))
    assert len(set(seen)) == len(seen)
    page.wait_for_timeout(300)
    assert "turn=90" in page.url
    page.keyboard.press("d")  # by keys: from one middle of the view to another
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    page.wait_for_timeout(300)
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_contain_text("µm")
    page.keyboard.press("d")
    page.keyboard.press("r")
    page.keyboard.press("r")
    page.keyboard.press("r")  # upright again
    page.locator("#measure").click()
    page.mouse.move(500, 300)
    page.mouse.down()
    page.mouse.move(600, 300, steps=3)
    page.mouse.up()
    expect(page.locator("#said")).to_have_text("50 µm")  # 100 px of 0.5 µm
    with page.expect_download() as download:
        page.keyboard.press("s")
    with Image.open(download.value.path()) as picture:
        view = page.locator(".pane").bounding_box()
        assert view is not None
        assert picture.size == (round(view["width"]), round(view["height"]))
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 100
    page.keyboard.press("Escape")
    page.keyboard.press("D")
    expect(page.locator("html.dark")).to_be_attached()
    page.mouse.click(view["x"] + view["width"] / 2, view["y"] + view["height"] / 2)
    expect(page.locator("#patch h2")).to_be_visible()
    check(page, f"{size}-dark")
    page.keyboard.press("g")
    expect(page.locator(".card canvas").first).to_be_visible()
    thumb = page.locator(".card .thumb").first
    before = thumb.screenshot()
    page.locator("#thumb-channel").select_option("probability: other")
    expect(page.locator(".card canvas").first).to_be_visible()
    assert thumb.screenshot() != before
    check(page, f"{size}-dark-gallery")
    page.reload()
    expect(page.locator("html.dark")).to_be_attached()


def test_values_never_lie_over_the_view(open_page: Callable[..., Page]) -> None:
    """With both panels open on a small screen, where there is the least room for them."""
    page = resized(open_page(at(SLIDE, Y, X, 0.5)), "small")
    page.mouse.click(500, 300)
    expect(page.locator("#patch h2")).to_be_visible()
    page.mouse.move(510, 310)
    values = page.locator("#values")
    expect(values).to_contain_text("gradcam: other")
    view, line, text = (page.locator(name).bounding_box() for name in (".pane", "#status-line", "#values"))
    assert view is not None
    assert line is not None
    assert text is not None
    assert text["y"] >= view["y"] + view["height"]
    assert text["y"] + text["height"] <= line["y"] + line["height"] <= 700
    page.mouse.move(5, 5)
    page.mouse.move(400, 60)  # where there is no slide perhaps: the view keeps its size
    page.wait_for_timeout(300)
    assert page.locator(".pane").bounding_box() == view


def test_classes_are_shown_at_once(open_page: Callable[..., Page]) -> None:
    page = resized(open_page(at(SLIDE, Y, X, 0.5)), "small")
    before = looks(page)
    page.locator("#layer-0 [data-name=channel]").select_option("predicted class")
    expect(page.locator(".class-item")).to_have_text(["other", "marker"])
    expect(page.locator("#layer-0 [data-name=map]")).to_have_count(0)
    classes = looks(page)
    slide_to(page.locator("#layer-0 [data-name=threshold]"), 0.9)  # only what is nearly sure
    assert len({before, classes, looks(page)}) == 3
    box = page.locator(".screen").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(page.locator("#values")).to_contain_text("predicted class marker ")
    check(page, "small-classes")
    page.wait_for_timeout(300)
    again = open_page(page.url[page.url.index("#") :])
    expect(again.locator(".class-item")).to_have_count(2)
