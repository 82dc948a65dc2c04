"""`open_result` gives what the stores hold, at the right places, and says what is wrong with what is asked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from PIL import Image

import wsi_gradcam
from tests.runs import SMALL, Heatmap, stored, toy_spec
from tests.synthetic import write_marker_slide
from wsi_gradcam.errors import ResultError, SlideError, SlideNotFoundError, UnknownNameError
from wsi_gradcam.geometry import Region
from wsi_gradcam.results.display import suggest_names
from wsi_gradcam.results.run import Result, find_result, open_result
from wsi_gradcam.results.slide import SlideResult

MPP = (0.25, 0.3)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over two slides, one of them in a folder, and a file that is no slide."""
    folder = tmp_path_factory.mktemp("result")
    (folder / "slides" / "inner").mkdir(parents=True)
    write_marker_slide(
        folder / "slides" / "a.tif", 1100, 1500, mpp=MPP, markers=[(500, 700)], marker_px=40, glass_px=200
    )
    write_marker_slide(folder / "slides" / "inner" / "b.tif", 600, 500, mpp=MPP, markers=[], marker_px=40)
    (folder / "slides" / "c.tif").write_bytes(b"no slide")
    settings = {**SMALL, "min_tissue": 0.5, "method": ("gradcam", "eigencam")}
    outcome = wsi_gradcam.explain(folder / "slides", toy_spec("marker"), folder / "out", **settings)
    assert [record.status for record in outcome.records if record.slide.id != "c.tif"] == ["ok", "ok"]
    return folder / "out"


@pytest.fixture
def result(out: Path) -> Result:
    return wsi_gradcam.open_result(out)


@pytest.fixture
def slide(result: Result) -> SlideResult:
    return result["a.tif"]


def test_a_result_has_the_run_s_slides(result: Result) -> None:
    assert result.ids == ["a.tif", "c.tif", "inner/b.tif"]
    assert [found.status for found in result] == ["ok", "failed", "ok"]
    assert "inner/b.tif" in result
    assert result.classes == ["other", "marker"]
    assert "not a" in result["c.tif"].error or "cannot" in result["c.tif"].error
    assert "3 slides" in repr(result)
    assert "a.tif: ok" in repr(result["a.tif"])


def test_a_slide_says_what_it_is(slide: SlideResult, out: Path) -> None:
    assert (slide.size_px, slide.mpp, slide.stride_px) == ((1100, 1500), MPP, 8)
    assert slide.levels == [(138, 188), (69, 94)]
    assert slide.path == str(out.parent / "slides" / "a.tif")
    assert [c.label for c in slide.channels] == Heatmap(out / "a.tif").labels
    assert [c.unit for c in slide.channels] == [
        "logit",
        "logit",
        "arbitrary",
        "arbitrary",
        "probability",
        "probability",
    ]
    shown = slide.channel("probability: marker")
    assert (shown.window, shown.number, shown.method, shown.target) == ((0.0, 1.0), 5, "probability", "marker")


def test_a_class_is_its_first_explanation(slide: SlideResult) -> None:
    assert slide.channel("marker").label == "gradcam: marker"
    assert slide.channel("eigencam: marker").number == 3


@pytest.mark.parametrize("level", [0, 1])
def test_a_heatmap_is_lazy_and_has_the_stored_values(slide: SlideResult, out: Path, level: int) -> None:
    heatmap = slide.heatmap("marker", level)
    assert isinstance(heatmap.data, da.Array)
    np.testing.assert_array_equal(heatmap, Heatmap(out / "a.tif").level(level, "gradcam: marker"))
    assert heatmap.attrs["units"] == "logit"
    np.testing.assert_array_equal(slide.coverage(level), Heatmap(out / "a.tif").flags(level))


def test_coordinates_are_where_the_marker_is(slide: SlideResult) -> None:
    heatmap = slide.heatmap("marker").compute()
    peak = heatmap.where(heatmap > heatmap.max() / 2, drop=True)
    assert abs(float(peak["y"].mean()) - 500) <= 8
    assert abs(float(peak["x"].mean()) - 700) <= 8
    assert abs(float(peak["y_um"].mean()) - 500 * MPP[0]) <= 8 * MPP[0]
    assert abs(float(peak["x_um"].mean()) - 700 * MPP[1]) <= 8 * MPP[1]
    assert heatmap["y"].values[0] == 4.0
    assert slide.heatmap("marker", 1)["x"].values[1] == 24.0


def test_masked_is_nan_where_nothing_was_explained(slide: SlideResult) -> None:
    masked, flags = slide.heatmap("marker", masked=True).values, slide.coverage().values
    np.testing.assert_array_equal(np.isnan(masked), flags & 2 == 0)
    assert 0 < np.isnan(masked).mean() < 1


def test_regions_are_read_from_any_level(slide: SlideResult) -> None:
    region = Region(10, 20, 30, 40)
    np.testing.assert_array_equal(slide.read("marker", 1, region), slide.heatmap("marker", 1).values[10:40, 20:60])
    assert slide.read_coverage(0, region).shape == (30, 40)


def test_patches_are_a_table_of_all_slides(result: Result, slide: SlideResult, out: Path) -> None:
    np.testing.assert_array_equal(slide.patches[["x", "y"]], stored(out / "a.tif", "xy"))
    whole = result.patches
    assert list(whole["slide"].unique()) == ["a.tif", "inner/b.tif"]
    assert len(whole) == sum(len(result[name].patches) for name in ("a.tif", "inner/b.tif"))
    assert list(slide.table(["y", "x"]).column_names) == ["y", "x"]


def test_cams_of_a_patch_are_in_the_heatmap_s_unit(slide: SlideResult) -> None:
    patches = slide.patches
    best = int(patches["cam_mean_marker"].argmax())
    cam = slide.cam(best, "marker")
    np.testing.assert_allclose(cam.mean(), patches["cam_mean_marker"][best], rtol=1e-5)
    np.testing.assert_allclose(cam.mean() - 1, patches["logit_marker"][best], rtol=1e-5)  # the bias is -1
    np.testing.assert_array_equal(slide.cams(best)[1], cam)
    assert slide.cams(best).shape == (4, *cam.shape)


def test_a_patch_is_seen_as_the_model_saw_it(slide: SlideResult) -> None:
    best = int(slide.patches["cam_mean_marker"].argmax())
    rgb = slide.patch_image(best)
    assert rgb.shape == (32, 32, 3)
    assert (rgb == (0, 255, 0)).all(axis=2).mean() > 0.1
    assert slide.thumbnail(100).shape == (61, 100, 3)  # in µm, not px


def test_notebooks_show_pictures_and_facts(result: Result, slide: SlideResult) -> None:
    picture = slide._repr_png_()
    assert picture is not None
    assert picture.startswith(b"\x89PNG")
    assert "data:image/png;base64" in slide._repr_html_()
    assert "1,500 x 1,100 px" in slide._repr_html_()
    assert "inner/b.tif" in result._repr_html_()
    assert result._repr_png_() is None
    failed = result["c.tif"]
    assert failed._repr_png_() is None
    assert "<img" not in failed._repr_html_()


def test_a_name_in_html_is_no_html(tmp_path: Path, out: Path) -> None:
    shutil.copytree(out, tmp_path / "<b>&")
    assert "&lt;b&gt;&amp;" in open_result(tmp_path / "<b>&")._repr_html_()


def test_a_run_of_one_slide_needs_no_name(tmp_path: Path, out: Path) -> None:
    shutil.copytree(out / "a.tif", tmp_path / "one" / "a.tif")
    shutil.copy(out / "run.yaml", tmp_path / "one")
    lines = (out / "slides.csv").read_text().splitlines()
    (tmp_path / "one" / "slides.csv").write_text("\n".join(lines[:2]) + "\n")
    one = open_result(tmp_path / "one")
    assert one.heatmap("marker").shape == (138, 188)
    assert one._repr_png_() == one["a.tif"]._repr_png_()


def test_a_run_of_many_slides_asks_which(result: Result) -> None:
    with pytest.raises(UnknownNameError, match=r"3 slides; choose one, expected one of a\.tif, c\.tif, inner/b\.tif"):
        result.heatmap("marker")
    assert result.heatmap("marker", "inner/b.tif").shape == (75, 63)


@pytest.mark.parametrize(
    ("name", "message"), [("A.tif", "did you mean a.tif"), ("../out/a.tif", "no slide"), ("zzz", "expected one of")]
)
def test_an_unknown_slide_is_refused(result: Result, name: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        result[name]


def test_unknown_channels_levels_and_patches_are_refused(slide: SlideResult) -> None:
    with pytest.raises(UnknownNameError, match="did you mean marker"):
        slide.heatmap("Markers")
    with pytest.raises(UnknownNameError, match="no level 2; the heatmap has 2"):
        slide.coverage(2)
    with pytest.raises(UnknownNameError, match="no patch"):
        slide.cams(-1)
    with pytest.raises(UnknownNameError, match="one number per patch"):
        slide.cam(0, "probability: marker")


def test_a_failed_slide_says_why(result: Result) -> None:
    asked: tuple[Callable[[SlideResult], Any], ...] = (lambda s: s.plan, lambda s: s.channels, lambda s: s.cams(0))
    for ask in asked:
        with pytest.raises(ResultError, match=r"c.tif: has no results \(.*c.tif.*run explain again"):
            ask(result["c.tif"])
    with pytest.raises(ResultError, match="is failed, it has no table yet"):
        _ = result["c.tif"].patches


def test_an_unfinished_slide_shows_what_there_is(tmp_path: Path, out: Path) -> None:
    """As a killed run leaves it: no slides.csv yet, no final record."""
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "slides.csv").unlink()
    (tmp_path / "out" / "a.tif" / "manifest" / "done.json").unlink()
    result = open_result(tmp_path / "out")
    assert result.ids == ["a.tif", "inner/b.tif"]
    assert [slide.status for slide in result] == ["unfinished", "ok"]
    assert result["a.tif"].heatmap("marker").shape == (138, 188)
    with pytest.raises(ResultError, match="unfinished, it has no table yet"):
        _ = result["a.tif"].patches


def test_a_slide_in_work_is_found_by_its_name(tmp_path: Path, out: Path) -> None:
    shutil.copytree(out, tmp_path / "out")
    result = open_result(tmp_path / "out")
    shutil.copytree(out / "a.tif", tmp_path / "out" / "new.tif")
    assert result["new.tif"].status == "ok"
    assert len(result) == 4


def test_nothing_finished_has_no_patches(tmp_path: Path, out: Path) -> None:
    shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns("done.json"))
    with pytest.raises(ResultError, match="no slide is finished"):
        _ = open_result(tmp_path / "out").patches


def test_what_is_no_result_is_refused(tmp_path: Path, out: Path) -> None:
    with pytest.raises(ResultError, match="does not exist"):
        open_result(tmp_path / "nothing")
    (tmp_path / "a.txt").touch()
    with pytest.raises(ResultError, match=r"no run\.yaml.*give the --out"):
        open_result(tmp_path)
    with pytest.raises(ResultError, match=f"open {out} and choose the slide"):
        open_result(out / "a.tif")


def test_a_result_is_found_from_a_slide_s_folder(out: Path, tmp_path: Path) -> None:
    for path, slide_id in (
        (out, None),
        (out / "inner/b.tif", "inner/b.tif"),
        (out / "a.tif/heatmap.ome.zarr", "a.tif"),
    ):
        result, slide = find_result(path)
        assert result.out == str(out)
        assert (slide and slide.id) == slide_id
    with pytest.raises(ResultError):
        find_result(tmp_path)


def test_a_slide_that_is_gone_or_another_is_told(tmp_path: Path, out: Path) -> None:
    shutil.copytree(out, tmp_path / "out")
    table = (tmp_path / "out" / "slides.csv").read_text()
    (tmp_path / "out" / "slides.csv").write_text(table.replace("/slides/a.tif", "/slides/gone.tif"))
    with pytest.raises(SlideNotFoundError):
        open_result(tmp_path / "out")["a.tif"].thumbnail()
    (tmp_path / "out" / "slides.csv").write_text(table.replace("/slides/a.tif", "/slides/inner/b.tif"))
    with pytest.raises(SlideError, match="not the file that was explained"):
        open_result(tmp_path / "out")["a.tif"].thumbnail()


def test_nothing_is_written(out: Path, slide: SlideResult) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    slide.heatmap("marker").compute()
    slide.cams(0)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_table_that_names_folders_outside_is_refused(tmp_path: Path, out: Path) -> None:
    shutil.copytree(out, tmp_path / "out")
    table = (tmp_path / "out" / "slides.csv").read_text()
    (tmp_path / "out" / "slides.csv").write_text(table.replace("inner/b.tif,", "../b.tif,"))
    with pytest.raises(ResultError, match="is not the name of a slide below OUT"):
        open_result(tmp_path / "out")


def test_exports_in_out_are_no_slides(tmp_path: Path, out: Path) -> None:
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "slides.csv").unlink()
    for name in ("exports/a.ome.zarr/x/manifest", "b/manifest/x/manifest"):
        (tmp_path / "out" / name).mkdir(parents=True)
        shutil.copy(out / "a.tif" / "manifest" / "plan.json", tmp_path / "out" / name)
    assert open_result(tmp_path / "out").ids == ["a.tif", "inner/b.tif"]


def test_near_names() -> None:
    assert suggest_names("x", []) == "there are none"
    assert suggest_names("zz", [f"n{i}" for i in range(20)]).endswith("n11, and 8 more")


def test_the_overview_is_a_picture(slide: SlideResult) -> None:
    with Image.open(BytesIO(slide.folder.overview.read())) as image:
        assert image.format == "PNG"
