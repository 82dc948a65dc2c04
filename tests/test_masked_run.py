"""Runs on a part of a slide: what is explained, what the table says of each patch, and what may be continued."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.runs import SMALL, Heatmap, differing, rows_of, stored, toy_file, toy_spec
from tests.slides_in_memory import ArraySlide
from tests.synthetic import corrupt_tile, write_marker_slide
from wsi_gradcam.api import explain, preview
from wsi_gradcam.cli.main import main
from wsi_gradcam.demo.slide import write_slide
from wsi_gradcam.errors import ConfigError
from wsi_gradcam.results.display import OUTLINE_COLOURS
from wsi_gradcam.results.heatmap import TISSUE
from wsi_gradcam.results.validation import validate
from wsi_gradcam.slides import open_slide, read_region
from wsi_gradcam.tissue.masks import (
    EXCLUDED_COLOUR,
    OUTLINE_COLOUR,
    PEN_COLOUR,
    SHADOW_COLOUR,
    slide_masks,
    write_mask_preview,
)
from wsi_gradcam.tissue.quality import measure_blur

SIZE = (640, 960)  # all tissue: 10 x 15 patches of 64 px
MODEL = toy_spec("pooled_linear")


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_marker_slide(
        tmp_path_factory.mktemp("slide") / "a.tif", *SIZE, mpp=0.25, markers=[], marker_px=16
    ).path


def square(name: str, top: int, left: int, side: int) -> dict[str, Any]:
    ring = [(left, top), (left + side, top), (left + side, top + side), (left, top + side), (left, top)]
    about = {"classification": {"name": name}}
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": about}


def drawn(path: Path, *features: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}), encoding="utf-8")
    return path


def table(out: Path, slide: str = "a.tif") -> dict[str, npt.NDArray[Any]]:
    found = pq.read_table(out / slide / "patches.parquet").to_pandas()
    return {name: found[name].to_numpy() for name in found.columns}


def places(out: Path) -> set[tuple[int, int]]:
    columns = table(out)
    return set(zip(columns["y"].tolist(), columns["x"].tolist(), strict=True))


def grid(top: int, left: int, side: int) -> set[tuple[int, int]]:
    return {(y, x) for y in range(top, top + side, 64) for x in range(left, left + side, 64)}


REGIONS = square("tumour", 128, 128, 256), square("stroma", 384, 512, 128), square("fold", 128, 128, 64)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, grid(128, 128, 256) | grid(384, 512, 128)),
        ({"include": "stroma"}, grid(384, 512, 128)),
        ({"exclude": ["fold"]}, grid(128, 128, 256) - {(128, 128)} | grid(384, 512, 128)),
    ],
    ids=str,
)
def test_what_is_in_the_mask_is_explained_and_nothing_else(
    slide: Path, tmp_path: Path, settings: dict[str, Any], expected: set[tuple[int, int]]
) -> None:
    mask = drawn(tmp_path / "m.geojson", *REGIONS)
    options = {**SMALL, "min_tissue": 0.5, "mask": mask, **settings}
    explain(slide, MODEL, tmp_path / "out", **options)
    assert places(tmp_path / "out") == expected
    assert (table(tmp_path / "out")["tissue"] >= 0.99).all()
    tissue = (Heatmap(tmp_path / "out" / "a.tif").flags(0) & TISSUE) > 0
    assert tissue.sum() == pytest.approx(len(expected) * 64, rel=0.02)
    assert validate(tmp_path / "out") == []
    assert preview(slide, MODEL, tmp_path / "none", **options).estimates[0].patches == len(expected)


def test_values_are_those_of_the_whole_slide(slide: Path, tmp_path: Path) -> None:
    explain(slide, MODEL, tmp_path / "whole", **SMALL)
    explain(
        slide, MODEL, tmp_path / "part", **{**SMALL, "mask": drawn(tmp_path / "m.json", REGIONS[0]), "min_tissue": 0.5}
    )
    whole, part = table(tmp_path / "whole"), table(tmp_path / "part")
    rows = {place: i for i, place in enumerate(zip(whole["y"], whole["x"], strict=True))}
    same = [rows[place] for place in zip(part["y"], part["x"], strict=True)]
    assert len(same) == 16
    for name in ("pen", "glass", "blur"):
        np.testing.assert_array_equal(whole[name][same], part[name])
    np.testing.assert_allclose(whole["logit_marker"][same], part["logit_marker"], atol=1e-5)


def test_a_picture_as_mask_and_the_whole_slide_as_tissue(tmp_path: Path) -> None:
    glass = np.full((640, 960, 3), 245, np.uint8)
    write_slide(tmp_path / "a.tif", glass, mpp=0.25)
    Image.fromarray(np.repeat([[0, 9, 0]], 2, axis=0).astype(np.uint8)).save(tmp_path / "m.png")
    out = tmp_path / "out"
    explain(
        tmp_path / "a.tif",
        MODEL,
        out,
        **{**SMALL, "mask": tmp_path / "m.png", "tissue": "everything", "min_tissue": 0.9},
    )
    assert places(out) == {(y, x) for y in range(0, 640, 64) for x in range(320, 640, 64)}
    assert (table(out)["glass"] == 1).all()
    explain(tmp_path / "a.tif", MODEL, tmp_path / "auto", **SMALL, mask=tmp_path / "m.png")
    assert rows_of(tmp_path / "auto")["a.tif"]["status"] == "no_tissue"


@pytest.fixture(scope="module")
def flagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on tissue, glass, a blue stroke and a bad tile."""
    folder = tmp_path_factory.mktemp("flags")
    rng = np.random.default_rng(0)
    level0 = np.clip(rng.normal((210, 130, 170), 12, (256, 1536, 3)), 0, 255).astype(np.uint8)
    level0[:, 1024:] = 244
    level0[:, 256:768] = np.clip(rng.normal((24, 60, 170), 4, (256, 512, 3)), 0, 255).astype(np.uint8)
    write_slide(folder / "whole.tif", level0, mpp=0.5)
    corrupt_tile(folder / "whole.tif", folder / "a.tif", 0, 0, 0)
    explain(folder / "a.tif", MODEL, folder / "out", **{**SMALL, "tissue": "everything", "max_unreadable": 1})
    return folder


class TestFlags:
    def test_shares_are_those_of_the_masks(self, flagged: Path) -> None:
        found = table(flagged / "out")
        assert set(found) >= {"tissue", "pen", "glass", "blur"}
        ok = found["status"] == "ok"
        inside = (found["x"] >= 256) & (found["x"] < 768)
        assert (found["pen"][inside & ok] == 1).all()
        assert (found["glass"][found["x"] >= 1088] == 1).all()
        beside = (found["x"] >= 832) & (found["x"] < 960)
        assert (found["pen"][beside] == 0).all()
        assert (found["glass"][beside] == 0).all()
        assert (found["tissue"] == 1).all()
        assert np.all(found["pen"] + found["glass"] <= 1 + 1e-6)

    def test_blur_is_of_the_pixels_that_the_model_got(self, flagged: Path) -> None:
        found = table(flagged / "out")
        ok = found["status"] == "ok"
        assert (~ok).any()
        assert np.isnan(found["blur"][~ok]).all()
        slide = open_slide(flagged / "a.tif")
        for i in np.flatnonzero(ok)[:: max(1, ok.sum() // 20)]:
            rgb = read_region(slide, float(found["y"][i]), float(found["x"][i]), 32, 32, 0.5)
            np.testing.assert_array_equal(found["blur"][i], measure_blur(rgb[None])[0])
        slide.close()
        np.testing.assert_array_equal(stored(flagged / "out" / "a.tif", "blur"), found["blur"].astype(np.float32))

    def test_ink_counts_as_tissue_where_that_is_asked_for(self, flagged: Path) -> None:
        for tissue, expected in (("auto", 0), ("with-pen", 1)):
            explain(flagged / "whole.tif", MODEL, flagged / tissue, **{**SMALL, "tissue": tissue, "min_tissue": 0.9})
            found = table(flagged / tissue, "whole.tif")
            assert ((found["x"] >= 384) & (found["x"] < 640)).any() == expected


@pytest.fixture(scope="module")
def finished(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    explain(slide, MODEL, folder / "out", **SMALL, mask=drawn(folder / "m.json", *REGIONS))
    return folder


class TestResume:
    def test_the_same_mask_elsewhere_goes_on(self, slide: Path, finished: Path, tmp_path: Path) -> None:
        moved = drawn(tmp_path / "elsewhere.json", *REGIONS)
        outcome = explain(slide, MODEL, finished / "out", **SMALL, mask=moved)
        assert [record.skipped for record in outcome.records] == [True]

    @pytest.mark.parametrize("change", ["changed", "none"])
    def test_another_mask_is_refused_and_results_stay(
        self, slide: Path, finished: Path, tmp_path: Path, change: str
    ) -> None:
        before = (finished / "out" / "a.tif" / "patches.parquet").read_bytes()
        mask = drawn(tmp_path / "m.json", REGIONS[0]) if change == "changed" else None
        (failed,) = explain(slide, MODEL, finished / "out", **SMALL, mask=mask).failed
        assert "holds results with a different mask" in failed.error
        assert "--overwrite" in failed.error
        assert (finished / "out" / "a.tif" / "patches.parquet").read_bytes() == before
        explain(slide, MODEL, finished / "out", **SMALL, mask=finished / "m.json", overwrite=True)
        assert validate(finished / "out") == []

    @pytest.mark.slow
    def test_a_cluster_makes_the_same_bytes(self, slide: Path, finished: Path, tmp_path: Path) -> None:
        explain(slide, toy_file(tmp_path, "pooled_linear"), tmp_path / "one", **SMALL, mask=finished / "m.json")
        explain(
            slide, toy_file(tmp_path, "pooled_linear"), tmp_path / "two", **SMALL, mask=finished / "m.json", workers=2
        )
        assert differing(tmp_path / "one", tmp_path / "two") == []


class TestArchive:
    def test_each_slide_has_its_mask_and_one_without_fails_alone(self, slide: Path, tmp_path: Path) -> None:
        (tmp_path / "slides").mkdir()
        (tmp_path / "masks").mkdir()
        for name in ("a.tif", "b.tif", "c.tif"):
            (tmp_path / "slides" / name).symlink_to(slide)
        drawn(tmp_path / "masks" / "a.json", REGIONS[0])
        drawn(tmp_path / "masks" / "c.tif.geojson", square("x", 0, 0, 63))
        out = tmp_path / "out"
        settings = {**SMALL, "min_tissue": 0.5, "mask": tmp_path / "masks"}
        (failed,) = explain(tmp_path / "slides", MODEL, out, **settings).failed
        assert failed.slide.id == "b.tif"
        assert "no mask for slide b.tif; expected b with one of the endings" in failed.error
        assert {name: row["patches"] for name, row in rows_of(out).items()} == {
            "a.tif": "16",
            "b.tif": "0",
            "c.tif": "1",
        }
        found = preview(tmp_path / "slides", MODEL, out, **settings)
        assert [entry.id for entry, _ in found.errors] == ["b.tif"]

    def test_one_file_for_many_slides_is_wrong_usage(self, slide: Path, tmp_path: Path) -> None:
        for name in ("a.tif", "b.tif"):
            (tmp_path / name).symlink_to(slide)
        with pytest.raises(ConfigError, match="one file of --mask for 2 slides"):
            explain(tmp_path, MODEL, tmp_path / "out", **SMALL, mask=drawn(tmp_path / "m.json", *REGIONS))


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


class TestCommandLine:
    def test_flags_reach_the_run(self, run: Run, slide: Path, tmp_path: Path) -> None:
        model = toy_file(tmp_path, "pooled_linear")
        mask = drawn(tmp_path / "m.json", *REGIONS)
        flags = ["--min-tissue", "0.5", "--heatmap-stride", "8", "--engine", "eager", "--precision", "float32"]
        code, _, err = run(
            "explain",
            slide,
            "--model",
            model,
            "--out",
            tmp_path / "out",
            *flags,
            "--mask",
            mask,
            "--include",
            "tumour",
            "stroma",
            "--exclude",
            "fold",
        )
        assert code == 0, err
        assert places(tmp_path / "out") == grid(128, 128, 256) - {(128, 128)} | grid(384, 512, 128)

    def test_a_class_that_is_not_in_the_file_fails_the_slide(self, run: Run, slide: Path, tmp_path: Path) -> None:
        model, mask = toy_file(tmp_path, "pooled_linear"), drawn(tmp_path / "m.json", *REGIONS)
        code, _, err = run(
            "explain", slide, "--model", model, "--out", tmp_path / "out", "--mask", mask, "--include", "tumor"
        )
        assert code == 1
        assert "no annotation is called 'tumor'; there are 'fold', 'stroma', 'tumour'" in err

    def test_info_draws_the_masks(self, run: Run, slide: Path, tmp_path: Path) -> None:
        mask = drawn(tmp_path / "m.json", *REGIONS)
        code, printed, err = run("info", slide, "--mask-out", tmp_path / "p.png", "--mask", mask, "--json")
        assert code == 0, err
        (found,) = json.loads(printed)
        assert found["picture"] == str(tmp_path / "p.png")
        assert "left out by the mask dark gray 86.7%" in found["it shows"]
        with Image.open(tmp_path / "p.png") as image:
            assert image.size == (960, 640)

    def test_info_shows_the_share_of_tissue_glass_and_unscanned_area(self, run: Run, tmp_path: Path) -> None:
        code, printed, err = run("info", half_glass(tmp_path / "a.tif"), "--json")
        assert code == 0, err
        (found,) = json.loads(printed)
        tissue, glass, *rest = (float(part.split()[-1].rstrip("%")) for part in found["area"].split(", "))
        assert tissue == pytest.approx(100 * 512 * 384 / (640 * 960), abs=3)
        assert tissue + glass == pytest.approx(100, abs=0.2)
        assert rest == [0, 0, 0]
        assert "not scanned 0.0%" in found["area"]
        Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(tmp_path / "c.png")
        assert "not measured: the mpp is not known" in run("info", tmp_path / "c.png")[1]

    def test_info_draws_one_slide(self, run: Run, slide: Path) -> None:
        code, _, err = run("info", slide, slide, "--mask-out", "p.png")
        assert (code, err) == (2, "error: --mask-out makes a picture of one slide, but 2 are given\n")

    def test_info_takes_an_mpp(self, run: Run, tmp_path: Path) -> None:
        write_slide(tmp_path / "a.tif", np.full((64, 64, 3), 200, np.uint8), mpp=0.5)
        code, _, err = run("info", tmp_path / "a.tif", "--mask-out", tmp_path / "p.png", "--mpp", "x")
        assert code == 2
        assert "--mpp is 'x'" in err
        code, _, err = run("info", tmp_path / "a.tif", "--mask-out", tmp_path / "p.png", "--mpp", "0.25,0.3")
        assert code == 0, err


def test_the_picture_shows_every_mask_in_its_colour(tmp_path: Path) -> None:
    level0 = np.full((400, 600, 3), 245, np.uint8)
    level0[100:300, 100:200] = (200, 120, 160)
    level0[100:300, 300:340] = (25, 60, 170)
    level0[:, 560:] = 120
    slide = ArraySlide([level0], (8.0, 8.0))
    shares = write_mask_preview(tmp_path / "p.png", slide)
    with Image.open(tmp_path / "p.png") as image:
        picture = np.asarray(image)
    masks = slide_masks(slide)
    assert shares == {
        "tissue": masks.tissue.mean(),
        "pen": masks.pen.mean(),
        "shadow": masks.shadow.mean(),
        "unscanned": 0.0,
        "glass": pytest.approx((masks.glass & ~masks.shadow).mean()),
        "excluded": 0.0,
    }
    np.testing.assert_array_equal(picture[150:250, 120:180], level0[150:250, 120:180])
    assert tuple(picture[200, 98]) == OUTLINE_COLOUR
    for place, colour in (((200, 320), PEN_COLOUR), ((200, 590), SHADOW_COLOUR)):
        mixed = np.array(level0[place]) * 0.35 + np.array(colour) * 0.65
        assert np.abs(picture[place] - mixed).max() <= 1
    np.testing.assert_array_equal(picture[50, 50], level0[50, 50])
    assert sum(EXCLUDED_COLOUR) < 200


def half_glass(path: Path) -> Path:
    """640 x 960 px at 0.25 um, with tissue in the left half only."""
    level0 = np.full((640, 960, 3), 245, np.uint8)
    level0[128:576, 128:448] = np.random.default_rng(0).normal((200, 120, 160), 12, (448, 320, 3)).clip(0, 255)
    write_slide(path, level0, mpp=0.25)
    return path


class TestMisplaced:
    """Masks in another frame are told, and are no slides without tissue."""

    def failed(self, tmp_path: Path, mask: Path, **options: Any) -> str:
        out = tmp_path / "out"
        explain(half_glass(tmp_path / "a.tif"), MODEL, out, **{**SMALL, "mask": mask, **options})
        row = rows_of(out)["a.tif"]
        assert row["status"] == "failed"
        return row["error"]

    def test_wholly_off_the_slide_is_told_with_both_extents(self, tmp_path: Path) -> None:
        mask = drawn(tmp_path / "m.json", square("tumour", 5000, 7000, 200), square("tumour", 6000, 100, 50))
        problem = "is outside the slide: its areas reach from x 100 to 7200 and from y 5000 to 6050, the slide to x 960"
        assert problem in self.failed(tmp_path, mask)
        negative = drawn(tmp_path / "m.json", square("tumour", -300, 10, 200))
        assert "from y -300 to -100" in self.failed(tmp_path, negative, overwrite=True)

    def test_so_is_a_chosen_class(self, tmp_path: Path) -> None:
        mask = drawn(tmp_path / "m.json", square("tumour", 5000, 7000, 200), square("fold", 100, 100, 50))
        assert "is outside the slide" in self.failed(tmp_path, mask, include="tumour")

    def test_on_glass_alone_is_told_with_both_extents(self, tmp_path: Path) -> None:
        error = self.failed(tmp_path, drawn(tmp_path / "m.json", square("tumour", 128, 640, 192)))
        assert "no tissue lies in it: it covers x 640 to 832, y 128 to 320, tissue is at x " in error
        assert "--tissue everything" in error
        picture = np.zeros((20, 30), np.uint8)
        picture[4:10, 20:26] = 1
        Image.fromarray(picture).save(tmp_path / "m.png")
        assert "no tissue lies in it: it covers x 640 to 832, y 128 to 320" in self.failed(
            tmp_path, tmp_path / "m.png", overwrite=True
        )

    def test_micrometres_are_told(self, tmp_path: Path) -> None:
        """An area on tissue, its coordinates a quarter as large: it lies in the glass of the corner."""
        error = self.failed(tmp_path, drawn(tmp_path / "m.json", square("tumour", 24, 24, 60)))
        assert "in micrometres it would lie on tissue" in error

    def test_everything_takes_it_all_the_same(self, tmp_path: Path) -> None:
        mask = drawn(tmp_path / "m.json", square("tumour", 128, 640, 192))
        explain(half_glass(tmp_path / "a.tif"), MODEL, tmp_path / "out", **SMALL, mask=mask, tissue="everything")
        assert rows_of(tmp_path / "out")["a.tif"]["status"] == "ok"

    def test_a_mask_of_nothing_is_no_tissue(self, tmp_path: Path) -> None:
        Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "m.png")
        explain(half_glass(tmp_path / "a.tif"), MODEL, tmp_path / "out", **SMALL, mask=tmp_path / "m.png")
        assert rows_of(tmp_path / "out")["a.tif"]["status"] == "no_tissue"

    def test_a_turned_picture_and_one_of_labels_are_refused(self, tmp_path: Path) -> None:
        labels = np.zeros((640, 960), np.uint8)
        labels[100:300, 100:300], labels[320:500, 100:300] = 1, 2
        Image.fromarray(np.rot90(labels)).save(tmp_path / "m.png")
        assert "640 x 960 px (width x height) do not have the proportions of the slide's 960 x 640 px" in self.failed(
            tmp_path, tmp_path / "m.png"
        )
        Image.fromarray(labels).save(tmp_path / "m.tif")
        options: dict[str, Any] = {"mask": tmp_path / "m.tif", "overwrite": True}
        assert "has the values 0, 1, 2, so it shows several classes" in self.failed(tmp_path, **options)
        explain(tmp_path / "a.tif", MODEL, tmp_path / "out", **SMALL, **options, include="2")
        assert {y for y, _ in places(tmp_path / "out")} <= set(range(256, 512, 64))


def test_a_mask_with_another_ending_is_wrong_usage(slide: Path, tmp_path: Path) -> None:
    (tmp_path / "m.jpg").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"expected one of the endings \.png \.tif \.tiff \.geojson"):
        explain(slide, MODEL, tmp_path / "out", **SMALL, mask=tmp_path / "m.jpg")


class TestOutlines:
    """`outlines` are drawn over the overview, and change nothing else."""

    def test_are_drawn_where_they_lie(self, slide: Path, tmp_path: Path) -> None:
        explain(slide, MODEL, tmp_path / "plain", **SMALL)
        outlines = drawn(tmp_path / "drawn.geojson", square("tumour", 128, 128, 256))
        explain(slide, MODEL, tmp_path / "outlined", **SMALL, outlines=outlines)
        plain, outlined = (
            np.asarray(Image.open(tmp_path / name / "a.tif" / "overview.png").convert("RGB")).astype(int)
            for name in ("plain", "outlined")
        )
        changed = np.abs(plain - outlined).max(axis=2) > 100
        rows, columns = np.nonzero(changed[:, : changed.shape[1] // 3])  # the first panel
        assert np.ptp(rows) == pytest.approx(np.ptp(columns), abs=4)  # a square stays one
        assert {path.name for path in (tmp_path / "plain/a.tif").iterdir()} == {
            path.name for path in (tmp_path / "outlined/a.tif").iterdir()
        }
        for name in ("cams.zarr", "heatmap.ome.zarr"):
            assert differing(tmp_path / "plain/a.tif" / name, tmp_path / "outlined/a.tif" / name) == []
        assert validate(tmp_path / "outlined") == []
        again = explain(slide, MODEL, tmp_path / "outlined", **SMALL)  # without them: the same results
        assert [record.status for record in again.records] == ["ok"]

    def test_of_a_folder_are_those_of_the_slide_of_that_name(self, slide: Path, tmp_path: Path) -> None:
        folder = tmp_path / "drawn"
        folder.mkdir()
        drawn(folder / "b.geojson", square("tumour", 128, 128, 256))
        explain(slide, MODEL, tmp_path / "without", **SMALL, outlines=folder)
        drawn(folder / "a.geojson", square("tumour", 128, 128, 256))
        explain(slide, MODEL, tmp_path / "with", **SMALL, outlines=folder)
        pictures = [(tmp_path / name / "a.tif/overview.png").read_bytes() for name in ("without", "with")]
        assert pictures[0] != pictures[1]

    def test_of_several_classes_each_have_their_colour_and_a_name(self, slide: Path, tmp_path: Path) -> None:
        shapes = square("tumour", 128, 128, 256), square("stroma", 64, 300, 100)
        explain(slide, MODEL, tmp_path / "out", **SMALL, outlines=drawn(tmp_path / "drawn.geojson", *shapes))
        picture = np.asarray(Image.open(tmp_path / "out/a.tif/overview.png").convert("RGB")).astype(int)
        for colour in OUTLINE_COLOURS[:2]:
            near = np.abs(picture - list(bytes.fromhex(colour))).max(axis=2) < 40
            assert near[:, picture.shape[1] // 3 :].any()  # over a map; the legend is in the first panel

    def test_that_cannot_be_drawn_are_refused_before_any_patch_is_explained(self, slide: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="--outlines"):
            explain(slide, MODEL, tmp_path / "out", **SMALL, outlines=tmp_path / "none.geojson")
        beside = drawn(tmp_path / "beside.geojson", square("tumour", 5000, 5000, 10))
        (record,) = explain(slide, MODEL, tmp_path / "out", **SMALL, outlines=beside).failed
        assert "is outside the slide" in record.error
        assert not (tmp_path / "out/a.tif/cams.zarr").exists()


def test_panels_of_a_long_slide_lie_below_each_other(tmp_path: Path) -> None:
    path = write_marker_slide(tmp_path / "long.tif", 192, 960, mpp=0.25, markers=[], marker_px=16).path
    explain(path, MODEL, tmp_path / "out", **SMALL)
    with Image.open(tmp_path / "out/long.tif/overview.png") as picture:
        assert picture.width < 1.5 * picture.height
