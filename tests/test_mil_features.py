"""Features made elsewhere: every format from files written by its own rules, and what contradicts itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.feature_formats import DIMENSIONS, MARK, MPP, WRITERS, Made, atlas, clam, frame, slide2vec, stamp, trident
from wsi_gradcam.errors import ConfigError, FeatureError
from wsi_gradcam.geometry import Region, ceil_div
from wsi_gradcam.mil.feature_arrays import FeatureFolder
from wsi_gradcam.mil.feature_files import open_features
from wsi_gradcam.mil.features import Claims, Settled, SlideFrame, place_patches
from wsi_gradcam.results.heatmap import blend_boxes

STRIDE = 64


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_a_marked_patch_lands_where_it_was_read(write: Callable[[Path, SlideFrame], Made], tmp_path: Path) -> None:
    slide = frame()
    made = write(tmp_path, slide)
    with open_features(made.folder, slide) as bag:
        assert len(bag) == len(bag.features) == len(made.xy)
        assert bag.features.shape == (len(made.xy), DIMENSIONS)
        np.testing.assert_allclose(bag.boxes[:, 1::-1], made.xy, atol=4)
        np.testing.assert_allclose(bag.boxes[:, 2:], made.side, atol=1)
        marks = np.concatenate([bag.features[i : i + 50] for i in range(0, len(bag), 50)])[:, 0]
    assert np.flatnonzero(marks).tolist() == [made.marked]
    values, covered = blend_boxes(bag.boxes, marks.astype(np.float32), STRIDE, whole(slide))
    truth = np.append(made.xy[made.marked][::-1], [made.side, made.side])
    assert_within_a_pixel(values, covered, truth)


def whole(slide: SlideFrame) -> Region:
    return Region(0, 0, ceil_div(slide.shape[0], STRIDE), ceil_div(slide.shape[1], STRIDE))


def assert_within_a_pixel(values: np.ndarray, covered: np.ndarray, truth: np.ndarray) -> None:
    """Each edge of what is marked in the heatmap is no further than a pixel from the marked patch's."""
    assert (values[~covered] == 0).all()
    rows, columns = np.nonzero(values > 0)
    height, width = values.shape
    found = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1])
    y, x, h, w = truth / STRIDE
    expected = np.array([y, x, min(y + h, height), min(x + w, width)])
    assert np.abs(found - expected).max() <= 1
    inside = values[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert (inside > 0).all()
    assert inside.max() <= MARK


@pytest.mark.parametrize(("height", "width"), [(6_000, 20_000), (20_000, 6_000)])
def test_a_slide_whose_axes_differ(height: int, width: int, tmp_path: Path) -> None:
    slide = frame(height, width)
    writers: tuple[Callable[[Path, SlideFrame], Made], ...] = (trident, clam, stamp, atlas, slide2vec)
    for i, write in enumerate(writers):
        made = write(tmp_path / str(i), slide)
        bag = open_features(made.folder, slide)
        np.testing.assert_allclose(bag.boxes[:, 1::-1], made.xy, atol=4)
        bag.close()


def test_pixels_that_are_no_squares(tmp_path: Path) -> None:
    slide = replace(frame(), mpp=(0.5, MPP))
    made = stamp(tmp_path, slide)
    bag = open_features(made.folder, slide)
    np.testing.assert_allclose(bag.boxes[:, 1::-1], made.xy, atol=1)
    assert any("0.2627 per pixel along both axes" in note for note in bag.notes)
    settled = open_features(made.folder, slide, patch_um=256.0)
    np.testing.assert_allclose(settled.boxes[0, 2:], [512, 256 / MPP])


# --- geometry that contradicts itself --------------------------------------------------------------------------------


def place(
    claims: Claims,
    xy: object,
    *,
    slide: SlideFrame | None = None,
    settled: Settled | None = None,
    tissue: np.ndarray | None = None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    return place_patches(
        "a.h5", np.asarray(xy, np.float64), claims, slide or frame(mpp=0.265), settled or Settled(), tissue
    )


def square(step: float, columns: int = 6, rows: int = 5) -> list[tuple[int, int]]:
    return [(round(i * step), round(j * step)) for i in range(columns) for j in range(rows)]


def claims(side: float, overlap: float | None = 0.0, **more: object) -> Claims:
    return Claims("TRIDENT", "px", (np.array([side, side]),), overlap, 128.0, **more)  # type: ignore[arg-type]


def test_a_footprint_of_a_rounded_magnification_gives_way_to_the_lattice() -> None:
    boxes, notes = place(claims(512), square(128 / 0.265))
    np.testing.assert_allclose(boxes[:, 2:], 128 / 0.265)
    (note,) = notes
    assert note.startswith("patches are 483.0 level-0 px wide according to their spacing")
    assert "the file says 512" in note


def test_a_footprint_that_the_lattice_bears_out_stays() -> None:
    boxes, notes = place(claims(512), square(512))
    assert (boxes[0, 2], notes) == (512, ())


def test_overlap_is_part_of_the_lattice() -> None:
    boxes, _ = place(claims(512, 0.25), square(384))
    assert boxes[0, 2] == 512
    boxes, notes = place(claims(512, 0.25), square(0.75 * 128 / 0.265))
    assert boxes[0, 2] == pytest.approx(483, abs=0.1)
    assert notes


def test_a_lattice_that_nothing_explains_is_refused() -> None:
    with pytest.raises(
        FeatureError, match=r"^a\.h5: patches of 512 level-0 px, but neighbours are 300 px apart; .*--feature-patch-um"
    ):
        place(claims(512), square(300))
    boxes, _ = place(claims(512), square(300), settled=Settled(patch_um=300 * 0.265))
    np.testing.assert_allclose(boxes[:, 2:], 300)
    _, (note,) = place(claims(512), square(300), settled=Settled(patch_um=30))
    assert "nothing covers the gaps" in note


def test_gaps_of_what_is_no_tissue_are_no_contradiction() -> None:
    boxes, notes = place(claims(512), square(1024))
    assert (boxes[0, 2], notes) == (512, ())


def test_too_few_neighbours_leave_what_is_stated_with_a_note() -> None:
    boxes, (note,) = place(claims(512), [(0, 0), (2000, 4096)])
    assert boxes[0, 2] == 512
    assert "--feature-patch-um settles it" in note


def test_one_of_two_sizes_by_the_lattice() -> None:
    either = Claims("CLAM", "px", (np.array([256.0, 256.0]), np.array([512.0, 512.0])))
    assert place(either, square(512))[0][0, 2] == 512
    assert place(either, square(256))[0][0, 2] == 256
    with pytest.raises(FeatureError, match="256 or 512 level-0 px, but their spacing does not tell which"):
        place(either, [(0, 0)])


def test_gaps_between_patches_are_noted() -> None:
    _, (note,) = place(Claims("CLAM", "px", (np.array([256.0, 256.0]),)), square(512))
    assert "nothing covers the gaps" in note


@pytest.mark.parametrize("missing", ["unit", "side", "both"])
def test_what_nothing_says_is_refused_by_its_flag(missing: str) -> None:
    known = Claims(
        "coordinates",
        None if missing != "side" else "px",
        () if missing != "unit" else (np.array([512.0, 512.0]),),
    )
    with pytest.raises(FeatureError, match="neighbours are 512 apart") as refused:
        place(known, square(512))
    text = str(refused.value)
    assert "\n" not in text
    assert ("--feature-unit" in text, "--feature-patch-um" in text) == (missing != "side", missing != "unit")
    boxes, _ = place(known, square(512), settled=Settled(512 * 0.265, "px"))
    assert boxes[0, 2] == pytest.approx(512)


def test_transposed_coordinates_are_refused_where_they_leave_the_slide() -> None:
    slide = frame(6_000, 20_000, 0.25)
    xy = np.array(square(512, 30, 8))
    with pytest.raises(FeatureError, match="inside with x and y swapped; use --feature-axes"):
        place(claims(512), xy[:, ::-1], slide=slide)
    right, _ = place(claims(512), xy, slide=slide)
    turned, _ = place(claims(512), xy[:, ::-1], slide=slide, settled=Settled(axes="yx"))
    np.testing.assert_array_equal(right, turned)


def test_transposed_coordinates_are_refused_where_they_leave_the_tissue() -> None:
    slide = frame(9_000, 9_000, 0.25)
    tissue = np.zeros((90, 90), np.bool_)
    tissue[:22, :80] = True
    xy = np.array(square(512, 14, 4))
    place(claims(512), xy, slide=slide, tissue=tissue)
    with pytest.raises(FeatureError, match=r"on tissue of a\.svs, and 100% with x and y swapped; use --feature-axes"):
        place(claims(512), xy[:, ::-1], slide=slide, tissue=tissue)


def test_another_order_than_the_program_has_is_noted() -> None:
    of_clam = Claims("CLAM", "px", (np.array([512.0, 512.0]),), by_columns=True)
    xy = np.array(square(512))
    assert place(of_clam, xy)[1] == ()
    _, (note,) = place(of_clam, xy[:, ::-1])
    assert "as if x and y were swapped" in note
    assert place(of_clam, xy[:, ::-1], settled=Settled(axes="yx"))[1] == ()


def test_swapped_sizes_of_the_slide_are_refused() -> None:
    swapped = claims(512, slide_px=(9_000, 14_000))
    with pytest.raises(FeatureError, match="the axes are swapped; use --feature-axes"):
        place(swapped, square(512))
    place(swapped, square(512), settled=Settled(axes="xy"))


def test_features_of_another_slide_are_refused() -> None:
    with pytest.raises(FeatureError, match=r"from a slide of 14001 x 9000 px, but a\.svs has 14000 x 9000"):
        place(claims(512, slide_px=(14_001, 9_000)), square(512))
    with pytest.raises(FeatureError, match=r"patch 5 at x 50000, y 0 lies outside a\.svs of 14000 x 9000 px"):
        place(claims(512), [*square(512, 5, 1), (50_000, 0)])
    with pytest.raises(FeatureError, match=r"patch 0 at x -512"):
        place(claims(512), [(-512, 0)])


def test_patches_that_reach_beyond_the_edge_are_fine() -> None:
    boxes, notes = place(claims(512), [(13_999, 8_999), (-511, -511)], settled=Settled(patch_um=512 * 0.265))
    assert len(boxes) == 2
    assert notes == ()


def test_coordinates_that_are_no_numbers_and_repeated_ones() -> None:
    with pytest.raises(FeatureError, match="the coordinates of patch 1 are not finite"):
        place(claims(512), [(0, 0), (np.nan, 0)])
    _, (note,) = place(claims(512), square(512) + square(512)[:3])
    assert note == "3 patches occur more than once"


def test_micrometres_need_a_pixel_size() -> None:
    um = Claims("STAMP", "um", (np.array([256.0, 256.0]),), 0.0)
    with pytest.raises(FeatureError, match="no known pixel size; give it with --mpp"):
        place(um, square(256), slide=replace(frame(), mpp=None))
    with pytest.raises(FeatureError, match="no known pixel size; give it with --mpp"):
        place(claims(512), square(512), slide=replace(frame(), mpp=None), settled=Settled(patch_um=128))


def test_flags_that_make_no_sense() -> None:
    for wrong in ({"patch_um": 0.0}, {"unit": "mm"}, {"axes": "xz"}):
        with pytest.raises(ConfigError, match="--feature-"):
            Settled(**wrong)


# --- files of a folder -----------------------------------------------------------------------------------------------


def test_two_encoders_are_told_apart_by_their_folder_or_size(tmp_path: Path) -> None:
    slide = frame()
    made = trident(tmp_path, slide)
    other = tmp_path / "20x_256px" / "features_conch"
    other.mkdir()
    with h5py.File(other / "a.h5", "w") as file:
        file["features"] = np.ones((len(made.xy), 5), np.float32)
        file["coords"] = made.xy
    with pytest.raises(
        FeatureError, match=r"several sets of features \(.*conch.*uni_v1.*\); give the folder of only one"
    ):
        open_features(tmp_path, slide)
    with open_features(tmp_path, slide, dimensions=DIMENSIONS) as bag:
        assert "uni_v1" in bag.source
    with open_features(tmp_path, slide, dimensions=5) as bag:  # its geometry comes from the file of coordinates
        assert bag.boxes[0, 2] == 512
    with pytest.raises(FeatureError, match="features of 5, 8 dimensions, but the model takes 3"):
        open_features(tmp_path, slide, dimensions=3)


def test_vectors_of_whole_slides_beside_those_of_patches_are_passed_over(tmp_path: Path) -> None:
    slide = frame()
    made = trident(tmp_path, slide)
    (tmp_path / "20x_256px" / "slide_features_titan").mkdir()
    with h5py.File(tmp_path / "20x_256px" / "slide_features_titan" / "a.h5", "w") as file:
        file["features"] = np.ones(768, np.float32)
        file["coords"] = made.xy
    with open_features(tmp_path, slide) as bag:
        assert bag.features.shape == (len(made.xy), DIMENSIONS)


def test_one_of_several_features_in_a_file(tmp_path: Path) -> None:
    slide = frame()
    made = atlas(tmp_path, slide, names=("conch", "uni_v1"))
    with pytest.raises(FeatureError, match=r"several sets of features \(conch, uni_v1\); choose with --feature-name"):
        open_features(made.folder, slide)
    with open_features(made.folder, slide, name="uni_v1") as bag:
        assert bag.features.shape[1] == DIMENSIONS - 1
        assert bag.features[:3].shape == (3, DIMENSIONS - 1)
    with pytest.raises(FeatureError, match=r"no features named gigapath of a\.svs, but conch, uni_v1"):
        open_features(made.folder, slide, name="gigapath")


def test_slides_are_matched_by_name_and_folder(tmp_path: Path) -> None:
    for name in ("x/1.h5", "y/1.h5", "z/TCGA-01.uuid.h5", "w/b.h5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    folder = FeatureFolder(tmp_path)
    names = {"x/1.svs": "x/1.h5", "TCGA-01.uuid.svs": "z/TCGA-01.uuid.h5", "b.ome.tif": "w/b.h5", "any/b.svs": "w/b.h5"}
    for slide_id, file in names.items():
        assert [str(path.relative_to(tmp_path)) for path in folder.files_of(slide_id)] == [file]
    with pytest.raises(FeatureError, match=r"no features of c\.svs; expected a file such as c\.h5"):
        folder.files_of("c.svs")
    both = FeatureFolder(tmp_path, ["p/b.svs", "q/b.svs"])
    with pytest.raises(FeatureError, match=r"several slides are named b; put those of q/b\.svs into a folder q, or"):
        both.files_of("q/b.svs")
    kinds = FeatureFolder(tmp_path, ["b.svs", "b.tif"])
    with pytest.raises(FeatureError, match=r"several slides are named b; of this slide name them b\.svs\.h5"):
        kinds.files_of("b.svs")
    (tmp_path / "b.svs.h5").write_bytes(b"")
    assert [path.name for path in FeatureFolder(tmp_path, ["b.svs", "b.tif"]).files_of("b.svs")] == ["b.svs.h5"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match="no such folder of features"):
        open_features(tmp_path / "none", frame())
    with pytest.raises(FeatureError, match="features are read from a local disk"):
        open_features("s3://bucket/features", frame())


def test_clam_without_its_patches_is_refused_and_settled_by_flags(tmp_path: Path) -> None:
    slide = frame()
    made = clam(tmp_path, slide, only="h5")
    (tmp_path / "patches" / "a.h5").unlink()
    with pytest.raises(FeatureError, match=r"--feature-unit px or um.*--feature-patch-um"):
        open_features(tmp_path, slide)
    with open_features(tmp_path, slide, unit="px", patch_um=256 * MPP) as bag:
        np.testing.assert_allclose(bag.boxes[:, 2:], 256)
        np.testing.assert_array_equal(bag.boxes[:, 1::-1], made.xy)


def test_coordinates_that_disagree_between_files_are_refused(tmp_path: Path) -> None:
    slide = frame()
    clam(tmp_path, slide, only="pt")
    (tmp_path / "other").mkdir()
    with h5py.File(tmp_path / "patches" / "a.h5") as file, h5py.File(tmp_path / "other" / "a.h5", "w") as copy:
        file.copy("coords", copy)
        copy["coords"][3] = (0, 0)
    with pytest.raises(FeatureError, match="2 files contradict each other about the positions"):
        open_features(tmp_path, slide)


def test_the_digest_follows_files_and_places(tmp_path: Path) -> None:
    slide = frame()
    made = slide2vec(tmp_path, slide)
    first, again = (open_features(made.folder, slide).digest for _ in range(2))
    other = open_features(made.folder, slide, patch_um=50.0).digest
    assert first == again != other


def test_real_files_without_geometry(shared_data: Path) -> None:
    slide = frame(40_000, 50_000)
    with pytest.raises(FeatureError, match=r"mopadi_a\.h5: features without the coordinates"):
        open_features(shared_data / "mil" / "mopadi_a.h5", slide)
    with pytest.raises(FeatureError, match=r"mopadi_b\.h5: .*neighbours are 512 apart; give these flags"):
        open_features(shared_data / "mil" / "mopadi_b.h5", slide)
    with open_features(shared_data / "mil" / "mopadi_b.h5", slide, unit="px", patch_um=512 * MPP) as bag:
        assert bag.features.shape == (777, 512)
        np.testing.assert_allclose(bag.boxes[0], [21504, 10240, 512, 512])
