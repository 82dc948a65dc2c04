"""Samples of 16 bits of which fewer are used: scaled where the file says how many, refused where they look it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import zarr

from tests.test_slides_ome_zarr_reader import write as write_zarr
from wsi_gradcam.errors import SlideContentError, SlideReadError
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides import open_slide

OME = (
    '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels '
    'ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="{1}" SizeY="{0}" SizeC="3" SizeZ="1" SizeT="1"{2}>'
    '<Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1"/></Pixels></Image></OME>'
)


def twelve_bits(folder: Path, form: str, bits: int | None, values: npt.NDArray[np.uint16]) -> Path:
    """A slide in colour of 16 bits that says how many of them it uses, or nothing."""
    if form == "ome-zarr":
        write_zarr(folder / "a.zarr/0", np.moveaxis(values, -1, 0))
        zarr.open_group(folder / "a.zarr", attributes={"ome": {"version": "0.5", "bioformats2raw.layout": 3}})
        said = "" if bits is None else f' SignificantBits="{bits}"'
        (folder / "a.zarr/OME").mkdir()
        (folder / "a.zarr/OME/METADATA.ome.xml").write_text(OME.format(*values.shape[:2], said))
        return folder / "a.zarr"
    about: dict[str, Any] = {"metadata": None}
    if form == "tag":
        about["extratags"] = [(281, 3, 3, (4095,) * 3, True)] if bits is not None else []
    else:
        said = "" if bits is None else f' SignificantBits="{bits}"'
        about["description"] = OME.format(*values.shape[:2], said)
    path = folder / ("a.ome.tif" if form == "ome-tiff" else "a.tif")
    tifffile.imwrite(path, values, tile=(64, 64), photometric="rgb", compression="deflate", **about)
    return path


@pytest.mark.parametrize("form", ["ome-tiff", "tag", "ome-zarr"])
def test_the_bits_that_are_used_are_scaled(form: str, tmp_path: Path) -> None:
    """12 bits in 16 would be dark; OpenSlide shows them so."""
    values = np.random.default_rng(0).integers(0, 4096, (128, 192, 3), np.uint16)
    path = twelve_bits(tmp_path, form, 12, values)
    with closing(open_slide(path, 0.5)) as slide:
        found = slide.read_level(0, Region(0, 0, *values.shape[:2]))
    np.testing.assert_array_equal(found, (values.astype(int) * 255 + 2047) // 4095)
    if form != "ome-zarr":
        with pytest.raises(SlideContentError, match="OpenSlide shows it in the wrong colours"):
            open_slide(path, 0.5, "openslide")


@pytest.mark.parametrize("form", ["ome-tiff", "ome-zarr"])
def test_samples_beyond_the_bits_that_are_used_are_unreadable(form: str, tmp_path: Path) -> None:
    values = np.full((128, 192, 3), 4000, np.uint16)
    values[100, 100] = 4096
    path = twelve_bits(tmp_path, form, 12, values)
    with closing(open_slide(path, 0.5)) as slide, pytest.raises(SlideReadError, match="above the 12 bits"):
        slide.read_level(0, Region(90, 90, 20, 20))


@pytest.mark.parametrize(
    ("form", "reader"),
    [("ome-tiff", "auto"), ("ome-tiff", "openslide"), ("tag", "auto"), ("tag", "openslide"), ("ome-zarr", "auto")],
)
def test_a_dark_picture_in_16_bits_is_refused(form: str, reader: str, tmp_path: Path) -> None:
    """Unless it is of channels that were chosen, as those of fluorescence are dark."""
    values = np.random.default_rng(0).integers(0, 4096, (128, 192, 3), np.uint16)
    path = twelve_bits(tmp_path, form, None, values)
    with pytest.raises(
        SlideContentError, match=r"a\..*: 16-bit samples that, .*; add SignificantBits to its OME-X"
    ) as caught:
        open_slide(path, 0.5, reader)
    assert str(caught.value).count(str(path)) == 1
    (tmp_path / "full").mkdir()
    open_slide(twelve_bits(tmp_path / "full", form, None, values * np.uint16(5)), 0.5, reader).close()


def test_chosen_channels_may_be_dark(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (4, 128, 192), np.uint16)
    tifffile.imwrite(tmp_path / "a.ome.tif", values, photometric="minisblack", metadata={"axes": "CYX"}, ome=True)
    caplog.set_level("WARNING", "wsi_gradcam")
    with closing(open_slide(tmp_path / "a.ome.tif", 0.5, channels=(2, 0, 1))) as slide:
        found = slide.read_level(0, Region(0, 0, 128, 192))
    np.testing.assert_array_equal(found, (np.moveaxis(values[[2, 0, 1]], 0, -1).astype(int) + 128) // 257)
    assert "a.ome.tif: 16-bit samples that, where checked, are all below a quarter of the scale" in caplog.text
