"""Levels that are made while tiles are decoded: where their pixels lie, how far off they are, runs that use them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image
from skimage.registration import phase_cross_correlation

from tests.runs import contents, toy_spec
from tests.synthetic import tissue_texture
from wsi_gradcam import explain, open_result
from wsi_gradcam.cam.facts import EXACT, SCALED, Choice, Trial
from wsi_gradcam.errors import ResumeError, SlideReadError
from wsi_gradcam.geometry import Region
from wsi_gradcam.results.run_files import identity_problems, read_run
from wsi_gradcam.slides import Slide, open_slide, read_region, with_reductions
from wsi_gradcam.slides.base import ByteRange, LocalFile

Rgb = npt.NDArray[np.uint8]
MPP, TILE = 0.25, 256
CODECS: dict[str, dict[str, Any]] = {
    "jpeg": {"compression": "jpeg", "compressionargs": {"level": 90}},
    "jpeg of 4:2:0": {"compression": "jpeg", "compressionargs": {"level": 90}, "subsampling": (2, 2)},
    "jpeg2000": {"compression": "jpeg2000", "compressionargs": {"level": 45}},
}
CLOSE = {"jpeg": 4.0, "jpeg of 4:2:0": 4.0, "jpeg2000": 8.0}  # gray levels in the mean


@pytest.fixture(scope="module")
def picture() -> Rgb:
    """Smooth tissue of a size that no tile divides, with a mark."""
    coarse = tissue_texture(320, np.random.default_rng(5))
    fine = np.asarray(Image.fromarray(coarse).resize((1280, 1280), Image.Resampling.BICUBIC)).copy()
    fine[901:1001, 707:807] = (255, 0, 255)
    return fine[:1203, :1100]


def write(path: Path, levels: list[Rgb], tile: int = TILE, **how: Any) -> Path:
    with tifffile.TiffWriter(path) as writer:
        for i, level in enumerate(levels):
            px = MPP * 2 ** (2 * i) / 1e4
            writer.write(
                level,
                tile=(tile, tile),
                photometric="rgb",
                subfiletype=int(i > 0),
                resolution=(1 / px, 1 / px),
                resolutionunit="CENTIMETER",
                metadata=None,
                **how,
            )
    return path


def both(path: Path) -> tuple[Slide, Slide]:
    return open_slide(path), with_reductions(open_slide(path))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("factor", [2, 4, 8, 2.74])
def test_patches_lie_where_exact_ones_do_and_differ_little(
    codec: str, factor: float, picture: Rgb, tmp_path: Path
) -> None:
    exact, scaled = both(write(tmp_path / "a.tif", [picture], **CODECS[codec]))
    side = int(1000 / factor)
    with closing(exact), closing(scaled):
        expected, found = (read_region(slide, 64, 96, side, side, MPP * factor) for slide in (exact, scaled))
    assert not np.array_equal(found, expected)
    assert np.abs(found.astype(int) - expected).mean() < CLOSE[codec]
    gray = [read.mean(axis=2) for read in (expected, found)]
    moved, _, _ = phase_cross_correlation(*gray, upsample_factor=50, normalization=None)
    assert np.abs(moved).max() < 0.1


@pytest.mark.parametrize("codec", CODECS)
def test_levels_have_their_sizes_and_reads_beyond_the_edge_are_background(
    codec: str, picture: Rgb, tmp_path: Path
) -> None:
    exact, scaled = both(write(tmp_path / "a.tif", [picture], **CODECS[codec]))
    with closing(exact), closing(scaled):
        assert [(level.height, level.width) for level in scaled.info.levels] == [
            (1203, 1100),
            (602, 550),
            (301, 275),
            (151, 138),
        ]
        assert [level.downsample_y for level in scaled.info.levels] == [1, 2, 4, 8]
        whole = scaled.read_level(1, Region(-3, -3, 608, 556))
        assert (whole[:3] == scaled.info.background).all()
        assert (whole[605:] == scaled.info.background).all()
        np.testing.assert_array_equal(whole[3:605, 3:553], scaled.read_level(1, Region(0, 0, 602, 550)))


def test_a_made_level_is_trusted_as_its_source_is_and_costs_no_further_tiles(
    picture: Rgb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = with_reductions(open_slide(write(tmp_path / "a.tif", [picture], **CODECS["jpeg"])))
    assert [level.made_of for level in slide.info.levels] == [None, 0, 0, 0]
    read: list[int] = []
    plain = LocalFile.read_many

    def counting(file: LocalFile, ranges: Sequence[ByteRange]) -> Sequence[bytes | OSError]:
        read.append(len(ranges))
        return plain(file, ranges)

    monkeypatch.setattr(LocalFile, "read_many", counting)
    with closing(slide):
        read_region(slide, 0, 0, TILE // 2, TILE // 2, 2 * MPP)
    assert read == [1]


def test_a_level_made_of_one_that_lies_elsewhere_is_not_used(picture: Rgb, tmp_path: Path) -> None:
    moved = np.roll(np.asarray(Image.fromarray(picture).reduce(4)), 9, axis=(0, 1))
    exact, scaled = both(write(tmp_path / "a.tif", [picture, moved], **CODECS["jpeg"]))
    with closing(exact), closing(scaled):
        assert [level.made_of for level in scaled.info.levels] == [None, 0, None, 2, 2, 2]
        expected, found = (read_region(slide, 64, 64, 100, 100, 8 * MPP) for slide in (exact, scaled))
    assert np.abs(found.astype(int) - expected).mean() < CLOSE["jpeg"]


def test_a_level_of_the_file_is_taken_rather_than_one_that_is_made(picture: Rgb, tmp_path: Path) -> None:
    small = np.asarray(Image.fromarray(picture).reduce(4))[:300, :275]
    exact, scaled = both(write(tmp_path / "a.tif", [picture, small], **CODECS["jpeg"]))
    with closing(exact), closing(scaled):
        assert [level.downsample_y for level in scaled.info.levels] == [1, 2, 4, 8, 16, 32]
        read = [read_region(slide, 0, 0, 200, 200, 4 * MPP) for slide in (exact, scaled)]
    np.testing.assert_array_equal(read[1], read[0])  # it is the file's own


@pytest.mark.parametrize(
    ("how", "tile"), [({"compression": "lzw"}, 256), ({"compression": "zstd"}, 256), ({"compression": "jpeg"}, 16)]
)
def test_what_cannot_be_made_smaller_is_left(how: dict[str, Any], tile: int, picture: Rgb, tmp_path: Path) -> None:
    exact, scaled = both(write(tmp_path / "a.tif", [picture[:300, :300]], tile, **how))
    with closing(exact), closing(scaled):
        assert len(scaled.info.levels) == (4 if how["compression"] == "jpeg" else 1)


def test_a_picture_and_other_readers_are_as_they_are(picture: Rgb, tmp_path: Path) -> None:
    Image.fromarray(picture).save(tmp_path / "a.png")
    slide = open_slide(tmp_path / "a.png", MPP)
    assert with_reductions(slide) is slide
    slide.close()


@pytest.mark.parametrize("codec", CODECS)
def test_a_damaged_tile_is_unreadable_scaled_too(codec: str, picture: Rgb, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", [picture[:512, :512]], **CODECS[codec])
    with tifffile.TiffFile(path, mode="r+") as file:
        counts = [int(count) for count in file.pages[0].databytecounts]
        counts[3] //= 2
        file.pages[0].tags["TileByteCounts"].overwrite(counts)  # type: ignore[union-attr]
    exact, scaled = both(path)
    with closing(exact), closing(scaled):
        scaled.read_level(1, Region(0, 0, 128, 256))
        with pytest.raises(SlideReadError, match="cannot be decoded"):
            scaled.read_level(1, Region(128, 128, 10, 10))


def test_choices_of_older_runs_are_read_and_written_as_they_were() -> None:
    plain = Choice("eager", "float32")
    assert set(plain.to_json()) == {"engine", "precision", "trials"}
    assert Choice.from_json(plain.to_json()) == plain
    decided = Choice("eager", "float32", (), SCALED, Trial("decode", SCALED, pearson=0.9999))
    assert Choice.from_json(decided.to_json()) == decided


@pytest.fixture(scope="module")
def slide(picture: Rgb, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("slides") / "a.tif", [picture], **CODECS["jpeg"])


RUN: dict[str, Any] = {"engine": "eager", "precision": "float32", "tissue": "everything", "patch_mpp": 2 * MPP}


def cams(out: Path) -> npt.NDArray[np.float32]:
    (slide,) = open_result(out)
    return np.asarray(slide.heatmap(0).values)


def test_a_run_reads_scaled_where_it_is_told_and_stays_with_it(slide: Path, tmp_path: Path) -> None:
    spec = toy_spec("pooled_linear", mpp=2 * MPP)
    explain(slide, spec, tmp_path / "exact", **RUN)
    explain(slide, spec, tmp_path / "scaled", **RUN, decode="scaled")
    stored = read_run(tmp_path / "scaled" / "run.yaml")
    assert stored is not None
    assert stored["identity"]["settings"]["decode"] == stored["choice"]["decode"] == SCALED
    assert not list(identity_problems(stored))
    found, expected = cams(tmp_path / "scaled"), cams(tmp_path / "exact")
    assert not np.array_equal(found, expected)
    assert np.nanmax(np.abs(found - expected)) < 0.2 * np.nanmax(np.abs(expected))
    with pytest.raises(ResumeError, match="decode"):
        explain(slide, spec, tmp_path / "scaled", **RUN)
    before = contents(tmp_path / "scaled" / "a.tif")
    explain(slide, spec, tmp_path / "scaled", **RUN, decode="scaled")
    assert contents(tmp_path / "scaled" / "a.tif") == before


@pytest.mark.slow
def test_a_run_by_workers_reads_as_one_alone(slide: Path, tmp_path: Path) -> None:
    spec = toy_spec("pooled_linear", mpp=2 * MPP)
    for name, workers in (("one", None), ("two", 2)):
        explain(slide, spec, tmp_path / name, **RUN, decode="scaled", workers=workers)
    np.testing.assert_array_equal(cams(tmp_path / "one"), cams(tmp_path / "two"))


@pytest.mark.parametrize(("likeness", "decode"), [(0.9, EXACT), (0.99999, SCALED)])
def test_auto_holds_it_to_the_agreement_of_maps(
    likeness: float, decode: str, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsi_gradcam.cam import auto

    monkeypatch.setattr(auto, "MIN_PEARSON", 2 * auto.MIN_PEARSON if decode == EXACT else 0.5)
    monkeypatch.setattr(auto, "MAX_PEAK_RISK", 1.0)
    explain(slide, toy_spec("pooled_linear", mpp=2 * MPP), tmp_path / "out", **RUN, decode="auto")
    stored = read_run(tmp_path / "out" / "run.yaml")
    assert stored is not None
    choice = Choice.from_json(stored["choice"])
    assert choice.decode == decode
    assert choice.decode_trial is not None
    assert choice.decode_trial.pearson is not None
    assert 0.5 < choice.decode_trial.pearson < 1
    assert bool(choice.decode_trial.remark) == (decode == EXACT)
    assert ("decode" in stored["identity"]["settings"]) == (decode == SCALED)


def test_auto_says_where_it_makes_no_difference(slide: Path, tmp_path: Path) -> None:
    settings = {**RUN, "patch_mpp": MPP}
    explain(slide, toy_spec("pooled_linear", mpp=MPP), tmp_path / "out", **settings, decode="auto")
    stored = read_run(tmp_path / "out" / "run.yaml")
    assert stored is not None
    trial = Choice.from_json(stored["choice"]).decode_trial
    assert trial is not None
    assert "no difference" in trial.remark
