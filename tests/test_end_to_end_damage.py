"""A damaged tile costs a run exactly the patches that need it, whichever reader opens the slide."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tifffile

from tests.runs import SMALL, Heatmap, rows_of, stored, toy_spec
from tests.synthetic import Damage, corrupt_tile, write_marker_slide
from wsi_gradcam.api import explain
from wsi_gradcam.geometry import Region
from wsi_gradcam.models.spec import ModelSpec
from wsi_gradcam.results.heatmap import EXPLAINED, UNREADABLE
from wsi_gradcam.results.validation import validate
from wsi_gradcam.slides import open_slide
from wsi_gradcam.slides.openslide_reader import OpenSlideSlide
from wsi_gradcam.slides.tiff_reader import TiffSlide

SIZE, MPP, PATCH_PX = (1024, 1536), "0.25", 32
TILE = Region(256, 512, 256, 256)  # the one that is damaged: row 1, column 2
READERS = {"tiff": TiffSlide, "auto": TiffSlide, "openslide": OpenSlideSlide}
DAMAGES: tuple[Damage, ...] = ("unreadable", "missing")
CAUSES = {"unreadable": r"px cannot be decoded: ", "missing": r"a tile is missing from the file"}
SETTINGS: dict[str, Any] = {**SMALL, "batch_size": 32, "span_patches": 256}


class Run(NamedTuple):
    """A finished run over a clean slide and over copies of it, each with a tile damaged in another way."""

    folder: Path
    reader: str
    mpp: str

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def step(self) -> Fraction:
        """Level-0 px per patch px."""
        return Fraction(self.mpp) / Fraction(MPP)

    @property
    def spec(self) -> ModelSpec:
        return toy_spec("pooled_linear", mpp=float(self.mpp))

    def table(self, name: str) -> pd.DataFrame:
        found: pd.DataFrame = pq.read_table(self.out / name / "patches.parquet").to_pandas()
        return found

    def lost(self) -> npt.NDArray[np.bool_]:
        """Which patches need a pixel of the tile."""
        table = self.table("clean.tif")
        rows = [meets(needed(y, self.step), TILE.y, TILE.bottom) for y in table["y"].tolist()]
        columns = [meets(needed(x, self.step), TILE.x, TILE.right) for x in table["x"].tolist()]
        found: npt.NDArray[np.bool_] = np.array(rows) & np.array(columns)
        return found


def needed(start: int, step: Fraction) -> tuple[int, int]:
    """The first and the last level-0 px that a patch from `start` on depends on, along one axis.

    Each of its pixels weighs those whose centre is less than a step away from its own, by a triangle; a step of 1
    needs no filter.
    """
    if step == 1:
        return start, start + PATCH_PX - 1
    half = Fraction(1, 2)
    first, last = start + step / 2 - step, start + step * PATCH_PX - step / 2 + step
    return math.floor(first - half) + 1, math.ceil(last - half) - 1


def meets(pixels: tuple[int, int], start: int, end: int) -> bool:
    return pixels[0] < end and pixels[1] >= start


def covered(places: pd.DataFrame, footprint: float, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Pixels of the heatmap that patches reach into."""
    inside, stride = np.zeros(shape, np.bool_), SMALL["heatmap_stride"]
    tops, lefts = np.arange(shape[0]) * stride, np.arange(shape[1]) * stride
    for y, x in zip(places["y"].tolist(), places["x"].tolist(), strict=True):
        rows = (tops < y + footprint) & (tops + stride > y)
        inside |= rows[:, None] & (lefts < x + footprint) & (lefts + stride > x)
    return inside


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    clean = write_marker_slide(
        folder / "clean.tif",
        *SIZE,
        mpp=float(MPP),
        markers=[(100, 200)],
        marker_px=16,
        downsamples=(4, 16),
        compression="jpeg",
    )
    for damage in DAMAGES:
        corrupt_tile(clean.path, folder / f"{damage}.tif", 0, TILE.y // 256, TILE.x // 256, damage=damage)
    return folder


# At 0.5 the patches end where the tile does: those beside it need it for their filter alone.
@pytest.fixture(scope="module", params=[(r, mpp) for r in READERS for mpp in ("0.25", "0.5", "0.36")], ids=str)
def run(request: pytest.FixtureRequest, slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = Run(tmp_path_factory.mktemp("run"), *request.param)
    explain(slides, made.spec, made.out, **SETTINGS, reader=made.reader, max_unreadable=0.5)
    return made


@pytest.mark.parametrize("reader", READERS)
def test_the_reader_is_the_one_meant(reader: str, slides: Path) -> None:
    for damage in DAMAGES:
        opened = open_slide(slides / f"{damage}.tif", reader=reader)
        assert type(opened) is READERS[reader]
        opened.close()


def test_the_filter_reaches_beyond_the_patch() -> None:
    """The oracle by example: of two level-0 px a pixel, one px beside the patch counts, a second one weighs 0."""
    assert needed(64, Fraction(1)) == (64, 95)
    assert needed(64, Fraction(2)) == (63, 128)
    assert needed(64, Fraction(3)) == (63, 160)


@pytest.mark.parametrize("damage", DAMAGES)
def test_exactly_the_patches_that_need_the_tile_are_unreadable(run: Run, damage: Damage) -> None:
    table, lost = run.table(f"{damage}.tif"), run.lost()
    assert {"0.25": 64, "0.5": 36, "0.36": 42}[run.mpp] == lost.sum()
    assert set(table["status"][lost]) == {"unreadable"}
    assert set(table["status"][~lost]) == {"ok"}
    assert table["cause"][lost].str.contains(rf"{damage}\.tif: level 0, x \d+, y \d+, .*{CAUSES[damage]}").all()
    assert table["cause"][~lost].isna().all()
    assert table.filter(regex="^(logit|probability|cam)_|^blur$")[lost].isna().all(axis=None)
    assert set(run.table("clean.tif")["status"]) == {"ok"}
    assert validate(run.out) == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_all_others_are_those_of_the_clean_slide_to_the_last_bit(run: Run, damage: Damage) -> None:
    clean, torn, lost = run.out / "clean.tif", run.out / f"{damage}.tif", run.lost()
    for name in ("xy", "logits", "cam"):
        assert stored(torn, name)[~lost].tobytes() == stored(clean, name)[~lost].tobytes()
    assert stored(clean, "logits")[lost].any()
    columns = [name for name in run.table("clean.tif") if name not in ("status", "cause")]
    pd.testing.assert_frame_equal(
        run.table(torn.name)[columns][~lost], run.table("clean.tif")[columns][~lost], check_exact=True
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_heatmap_has_a_hole_there_and_only_there(run: Run, damage: Damage) -> None:
    whole, torn = Heatmap(run.out / "clean.tif"), Heatmap(run.out / f"{damage}.tif")
    table, lost, footprint = run.table("clean.tif"), run.lost(), float(run.step * PATCH_PX)
    shape = whole.flags(0).shape
    hole = covered(table[lost], footprint, shape)
    assert 0 < hole.sum() < 0.1 * hole.size
    np.testing.assert_array_equal(torn.flags(0) & UNREADABLE > 0, hole)
    assert not (whole.flags(0) & UNREADABLE).any()
    assert not (torn.flags(0) & EXPLAINED)[hole & ~covered(table[~lost], footprint, shape)].any()
    np.testing.assert_array_equal(torn.flags(0)[~hole], whole.flags(0)[~hole])
    for label in whole.labels:
        np.testing.assert_array_equal(torn.level(0, label)[~hole], whole.level(0, label)[~hole])
    for level in range(1, len(whole.datasets)):
        hole = np.pad(hole, [(0, n % 2) for n in hole.shape])
        hole = hole[::2, ::2] | hole[1::2, ::2] | hole[::2, 1::2] | hole[1::2, 1::2]
        np.testing.assert_array_equal(torn.flags(level) & UNREADABLE > 0, hole)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_list_of_slides_tells_it_and_max_unreadable_decides(run: Run, slides: Path, damage: Damage) -> None:
    count, total = int(run.lost().sum()), len(run.lost())
    row = rows_of(run.out)[f"{damage}.tif"]
    assert (row["status"], row["patches"], row["unreadable"]) == ("ok", str(total), str(count))
    assert row["error"].startswith(f"{count} of {total} patches are unreadable: {slides}/{damage}.tif: level 0, ")
    for share, status in (((count - 0.5) / total, "failed"), ((count + 0.5) / total, "ok")):
        outcome = explain(slides, run.spec, run.out, **SETTINGS, reader=run.reader, max_unreadable=share)
        assert {r.slide.id: r.status for r in outcome.records} == {
            "clean.tif": "ok",
            "missing.tif": status,
            "unreadable.tif": status,
        }
        assert all(record.skipped for record in outcome.records)  # nothing is computed for the change
        row = rows_of(run.out)[f"{damage}.tif"]
        assert row["status"] == status
        assert row["error"].endswith(f"; more than --max-unreadable {share:g}") == (status == "failed")


@pytest.mark.parametrize("pages", [1, 3])
@pytest.mark.parametrize("reader", READERS)
def test_a_codec_that_nobody_knows_fails_the_slide_and_nothing_is_black(
    slides: Path, tmp_path: Path, reader: str, pages: int
) -> None:
    """Of the finest level alone, where the thumbnail can still be read, and of all levels."""
    path = tmp_path / "strange.tif"
    path.write_bytes((slides / "clean.tif").read_bytes())
    with tifffile.TiffFile(path) as file:
        tags: list[Any] = [page.tags["Compression"] for page in file.pages]  # type: ignore[union-attr]
        order = file.byteorder
    with path.open("r+b") as raw:
        for tag in tags[:pages]:
            raw.seek(tag.valueoffset)
            raw.write(struct.pack(f"{order}H", 60_000))
    spec = toy_spec("pooled_linear", mpp=float(MPP))
    (record,) = explain(path, spec, tmp_path / "out", **SETTINGS, reader=reader).records
    assert record.status == "failed"
    assert "strange.tif" in record.error
    folder = tmp_path / "out" / "strange.tif"
    if (folder / "heatmap.ome.zarr").exists():
        assert not (Heatmap(folder).flags(0) & EXPLAINED).any()
        assert set(pq.read_table(folder / "patches.parquet")["status"].to_pylist()) == {"unreadable"}
