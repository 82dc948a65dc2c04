"""OME-Zarr 0.4 is valid by two independent models of it, and equal in all values to the result."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import xarray
import yaozarrs
import zarr
from ome_zarr_models import v04

from tests.made_results import Made, make, steps
from wsi_gradcam.export import export
from wsi_gradcam.results.run import open_result
from wsi_gradcam.results.slide import SlideResult
from wsi_gradcam.slides import open_slide

OME = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Made((4 * 600, 4 * 2100 - 1), steps((600, 2100)), stride=4)  # more than one shard
    return make(tmp_path_factory.mktemp("made") / "out", {"a.svs": made})


@pytest.fixture
def slide(out: Path) -> SlideResult:
    return open_result(out)["a.svs"]


def test_validators_accept_it(out: Path, tmp_path: Path) -> None:
    (done,) = export(out, "ome-zarr-0.4", tmp_path)
    (path,) = done.paths
    assert path.name == "a.svs.ome.zarr"  # Bio-Formats looks for the first ".zarr" in a path
    found = yaozarrs.validate_zarr_store(str(path))
    assert found.ome_version() == "0.4"
    v04.Image.from_zarr(zarr.open_group(path, mode="r"))
    v04.Labels.from_zarr(zarr.open_group(path / "labels", mode="r"))
    v04.ImageLabel.from_zarr(zarr.open_group(path / "labels" / "coverage", mode="r"))


def test_values_and_scales_are_the_result_s(out: Path, slide: SlideResult, tmp_path: Path) -> None:
    (done,) = export(out, "ome-zarr-0.4", tmp_path)
    group = zarr.open_group(done.paths[0], mode="r")
    assert group.metadata.zarr_format == 2
    for level, shape in enumerate(slide.levels):
        array, flags = group[str(level)], group[f"labels/coverage/{level}"]
        assert isinstance(array, zarr.Array)
        assert (array.shape, array.chunks, str(array.dtype)) == ((3, *shape), (1, 512, 512), "float32")
        for channel in slide.channels:
            np.testing.assert_array_equal(array[channel.number], slide.heatmap(channel.label, level).values)
        np.testing.assert_array_equal(np.asarray(flags), slide.coverage(level).values)
    (multiscale,) = slide.store.attributes["ome"]["multiscales"]
    (stored,) = dict(group.attrs)["multiscales"]  # type: ignore[misc]
    assert stored == {**multiscale, "version": "0.4"}


def test_xarray_and_ngff_zarr_take_arrays_and_groups(out: Path, slide: SlideResult, tmp_path: Path) -> None:
    """Axes are named as xarray asks for it, chunks are of the codec that all readers know, and OME is a group."""
    (done,) = export(out, "ome-zarr-0.4", tmp_path)
    (path,) = done.paths
    others = [str(level) for level in range(1, len(slide.levels))]
    for place, axes in ((path, ("c", "y", "x")), (path / "labels" / "coverage", ("y", "x"))):
        found = xarray.open_zarr(place, consolidated=False, drop_variables=others)["0"]
        assert found.dims == axes
        array = zarr.open_array(place / "0", mode="r")
        assert [getattr(codec, "codec_id", "") for codec in array.compressors] == ["blosc"]
    assert set(zarr.open_group(path, mode="r").group_keys()) == {"labels", "OME"}


def test_chosen_channels_have_the_chosen_window(out: Path, slide: SlideResult, tmp_path: Path) -> None:
    chosen = ("probability: tumour", "eigencam: tumour")
    (done,) = export(out, "ome-zarr-0.4", tmp_path, channel=chosen, window=(0.25, 0.75))
    group = zarr.open_group(done.paths[0], mode="r")
    omero = dict(group.attrs)["omero"]
    assert isinstance(omero, dict)
    shown = omero["channels"]
    assert [channel["label"] for channel in shown] == list(chosen)
    assert [(c["window"]["start"], c["window"]["end"]) for c in shown] == [(0.25, 0.75)] * 2
    assert [channel["active"] for channel in shown] == [True, False]
    np.testing.assert_array_equal(np.asarray(group["0"])[0], slide.heatmap(chosen[0]).values)


def test_windows_of_the_run_are_the_default(out: Path, tmp_path: Path) -> None:
    (done,) = export(out, "ome-zarr-0.4", tmp_path)
    omero = dict(zarr.open_group(done.paths[0], mode="r").attrs)["omero"]
    assert isinstance(omero, dict)
    windows = open_result(out).windows()
    for shown in omero["channels"]:
        assert (shown["window"]["start"], shown["window"]["end"]) == windows[shown["label"]]
        assert shown["window"]["min"] <= 0 < shown["window"]["max"]


def test_bio_formats_is_told_sizes(out: Path, slide: SlideResult, tmp_path: Path) -> None:
    (done,) = export(out, "ome-zarr-0.4", tmp_path)
    pixels = ET.parse(done.paths[0] / "OME" / "METADATA.ome.xml").getroot().find(f"{OME}Image/{OME}Pixels")
    assert pixels is not None
    names = ("PhysicalSizeX", "PhysicalSizeY", "SizeX", "SizeY", "SizeC")
    assert [float(pixels.attrib[name]) for name in names] == [1.2, 1, 2100, 600, 3]
    channels = pixels.findall(f"{OME}Channel")
    assert [c.attrib["Name"] for c in channels] == [c.label for c in slide.channels]
    rgb = [(int(c.attrib["Color"]) % 2**32 >> 8).to_bytes(3, "big").hex().upper() for c in channels]
    assert rgb == [c.colour for c in slide.channels]


def test_ome_zarr_is_no_slide_of_ours(out: Path, tmp_path: Path) -> None:
    """A result is not to be explained: whoever tries it is told."""
    (done,) = export(out, "ome-zarr-0.4", tmp_path)
    with pytest.raises(ValueError, match="a heatmap made by wsi_gradcam, not a slide"):
        open_slide(done.paths[0])
