"""Pictures that are not one in colour or gray: read as what they are, or refused by every reader."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import zarr

import wsi_gradcam
from tests.runs import SMALL, toy_spec
from tests.servers import web_server
from wsi_gradcam.cli.flags import parse_text
from wsi_gradcam.errors import ConfigError, SlideContentError
from wsi_gradcam.geometry import Region
from wsi_gradcam.results.run import open_result
from wsi_gradcam.run.settings import make_settings
from wsi_gradcam.slides import open_slide, read_region
from wsi_gradcam.slides.base import Channel, shown_channels

Rgb = npt.NDArray[np.uint8]
RED, GREEN, BLUE = -16776961, 16711935, 65535  # of OME-XML


def noise(*shape: int) -> Any:
    return np.random.default_rng(4).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, planes: Any, channels: dict[str, Any] | None = None, **options: Any) -> Path:
    metadata: dict[str, Any] = {"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    if channels:
        metadata["Channel"] = channels
    tifffile.imwrite(
        path, planes, ome=True, **{"photometric": "minisblack", "tile": (64, 64), "metadata": metadata, **options}
    )
    return path


def shown(path: Path, reader: str = "auto", **options: Any) -> Rgb:
    with closing(open_slide(path, reader=reader, **options)) as slide:
        return slide.read_level(0, Region(0, 0, slide.info.height, slide.info.width))


SAID: dict[str, tuple[dict[str, Any], list[int]]] = {
    "names": ({"Name": ["Red", "Green", "Blue"]}, [0, 1, 2]),
    "letters": ({"Name": ["R", "G", "B"]}, [0, 1, 2]),
    "other order": ({"Name": ["blue", "Channel:green", "red channel"]}, [2, 1, 0]),
    "colours": ({"Color": [RED, GREEN, BLUE]}, [0, 1, 2]),
    "colours, other order": ({"Color": [GREEN, BLUE, RED], "Name": ["Channel 0", "Channel 1", "2"]}, [2, 0, 1]),
}


@pytest.mark.parametrize("layout", [{}, {"tile": None}, {"compression": "deflate"}, {"compression": "jpeg"}], ids=str)
@pytest.mark.parametrize("said", SAID)
def test_planes_that_are_red_green_and_blue_are_a_picture_in_colour(
    said: str, layout: dict[str, Any], tmp_path: Path
) -> None:
    names, order = SAID[said]
    planes = noise(3, 200, 300) // 8 + 100
    found = shown(write(tmp_path / "a.ome.tif", planes, names, **layout)).astype(int)
    off = np.abs(found - np.moveaxis(planes[order], 0, -1))
    assert off.max() <= (24 if "jpeg" in str(layout) else 0)
    with closing(open_slide(tmp_path / "a.ome.tif")) as slide:
        assert slide.info.mpp == pytest.approx((0.5, 0.5))


def test_openslide_does_not_show_the_first_of_three_colours(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ome.tif", noise(3, 128, 192), SAID["names"][0])
    with pytest.raises(SlideContentError, match="OpenSlide shows it in the wrong colours; use --reader auto"):
        open_slide(path, reader="openslide")


def test_planes_have_levels_too(tmp_path: Path) -> None:
    planes, options = noise(3, 256, 384), dict[str, Any](photometric="minisblack", tile=(64, 64))
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as writer:
        names = {"axes": "CYX", "Channel": {"Name": ["Red", "Green", "Blue"]}}
        writer.write(planes, subifds=1, metadata=names, **options)
        writer.write(planes[:, ::2, ::2], subfiletype=1, **options)
    with closing(open_slide(tmp_path / "a.ome.tif", 0.5)) as slide:
        assert [level.height for level in slide.info.levels] == [256, 128]
        np.testing.assert_array_equal(
            slide.read_level(1, Region(0, 0, 128, 192)), np.moveaxis(planes[:, ::2, ::2], 0, -1)
        )


def test_sixteen_bits_and_one_page_of_planes(tmp_path: Path) -> None:
    planes = np.random.default_rng(0).integers(0, 65_536, (3, 100, 100), np.uint16)
    expected = np.moveaxis((planes.astype(np.uint32) + 128) // 257, 0, -1)
    np.testing.assert_array_equal(shown(write(tmp_path / "a.ome.tif", planes, SAID["names"][0])), expected)
    tifffile.imwrite(tmp_path / "b.tif", planes, photometric="minisblack", planarconfig="separate", metadata=None)
    with pytest.raises(SlideContentError, match=r"b.tif: 3 separate channels, as in"):
        open_slide(tmp_path / "b.tif", 0.5)
    np.testing.assert_array_equal(shown(tmp_path / "b.tif", mpp=0.5, channels=(2, 1, 0)), expected[..., ::-1])


STAINS: dict[str, tuple[int, dict[str, Any]]] = {
    "four": (4, {"Name": ["DAPI", "FITC", "Cy3", "Cy5"]}),
    "four without names": (4, {}),
    "three without names": (3, {}),
    "two": (2, {"Name": ["DAPI", "FITC"]}),
    "three stains in pure colours": (3, {"Name": ["Cy5", "FITC", "DAPI"], "Color": [RED, GREEN, BLUE]}),
    "three lights": (3, {"Name": ["Red", "Green", "Blue"], "EmissionWavelength": [670, 520, 460]}),
}


@pytest.mark.parametrize("reader", ["auto", "tiff", "openslide"])
@pytest.mark.parametrize("tile", [(64, 64), None])
@pytest.mark.parametrize("said", STAINS)
def test_stains_of_fluorescence_are_refused_by_every_reader(said: str, tile: Any, reader: str, tmp_path: Path) -> None:
    count, names = STAINS[said]
    path = write(tmp_path / "a.ome.tif", noise(count, 128, 192), names, tile=tile)
    if reader == "openslide" and tile is None:
        return  # it knows no strips
    with pytest.raises(SlideContentError, match=rf"a.ome.tif: {count} separate channels.*--channels 0,1,2"):
        open_slide(path, reader=reader)


@pytest.mark.parametrize("tile", [(64, 64), None])
def test_chosen_channels_are_shown(tile: Any, tmp_path: Path) -> None:
    planes = noise(4, 128, 192)
    path = write(tmp_path / "a.ome.tif", planes, STAINS["four"][1], tile=tile)
    np.testing.assert_array_equal(shown(path, channels=(3, 0, 0)), np.moveaxis(planes[[3, 0, 0]], 0, -1))
    with web_server(tmp_path) as server, closing(open_slide(f"{server.url}/a.ome.tif", channels=(2, 1, 0))) as slide:
        found = slide.read_level(0, Region(0, 0, 128, 192))
    np.testing.assert_array_equal(found, np.moveaxis(planes[[2, 1, 0]], 0, -1))
    with pytest.raises(SlideContentError, match="channels 0,1,4 were chosen; it has 4, counted from 0"):
        open_slide(path, channels=(0, 1, 4))


def test_a_slide_in_colour_is_shown_as_it_is_whatever_is_chosen(tmp_path: Path) -> None:
    picture = noise(128, 192, 3)
    tifffile.imwrite(tmp_path / "a.tif", picture, tile=(64, 64), photometric="rgb", metadata=None)
    for reader in ("auto", "tiff", "openslide"):
        np.testing.assert_array_equal(shown(tmp_path / "a.tif", reader, mpp=0.5, channels=(2, 1, 0)), picture)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "int16": (np.zeros((128, 192), np.int16), {"photometric": "minisblack"}, "samples are 16 bits, INT"),
    "cielab": (
        np.full((128, 192, 3), 120, np.uint8),
        {"photometric": "cielab"},
        "3 samples of CIELAB are not a supported colour space",
    ),
    "five samples": (
        np.zeros((128, 192, 5), np.uint8),
        {"photometric": "minisblack", "planarconfig": "contig"},
        "5 separate channels",
    ),
    "five in colour": (
        np.zeros((128, 192, 5), np.uint8),
        {"photometric": "rgb", "planarconfig": "contig"},
        "5 samples per pixel, 2 of which are neither colour",
    ),
    "a stack": (np.zeros((3, 128, 192, 3), np.uint8), {"photometric": "rgb"}, "3 separate images"),
    "float": (np.zeros((128, 192), np.float32), {"photometric": "minisblack"}, "samples are 32 bits, IEEEFP"),
}


@pytest.mark.parametrize("reader", ["auto", "tiff", "openslide"])
@pytest.mark.parametrize("ending", ["svs", "tif"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_is_refused_by_every_reader(name: str, ending: str, reader: str, tmp_path: Path) -> None:
    data, options, said = REFUSED[name]
    path = tmp_path / f"a.{ending}"
    about: dict[str, Any] = {}
    if ending == "svs":
        about["description"] = "Aperio Image Library v1\n192x128 (64x64)|MPP = 0.5"
    tifffile.imwrite(path, data, tile=(64, 64), metadata=None, **options, **about)
    if (name, ending) == ("a stack", "svs"):
        return  # in Aperio's format further pictures are levels, thumbnail and label
    with pytest.raises(SlideContentError, match=rf"a.{ending}: {said}"):
        open_slide(path, 0.5, reader)


# --- OME-Zarr ---


def write_zarr(path: Path, planes: Any, channels: list[dict[str, str]] | None) -> Path:
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.create_array("0", data=planes, chunks=(1, 64, 64))
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space", "unit": "micrometer"} for n in "yx")]
    scale = [{"type": "scale", "scale": [1.0, 0.5, 0.5]}]
    ome: dict[str, Any] = {"version": "0.5"}
    ome["multiscales"] = [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}]
    if channels is not None:
        ome["omero"] = {"channels": channels}
    group.attrs["ome"] = ome
    return path


def test_channels_of_an_ome_zarr(tmp_path: Path) -> None:
    planes = noise(4, 128, 192)
    colours = np.moveaxis(planes[:3], 0, -1)
    np.testing.assert_array_equal(shown(write_zarr(tmp_path / "a.zarr", planes[:3], None)), colours)
    blue_first = [{"label": f"Channel {i}", "color": color} for i, color in enumerate(("0000FF", "00FF00", "FF0000"))]
    np.testing.assert_array_equal(shown(write_zarr(tmp_path / "b.zarr", planes[:3], blue_first)), colours[..., ::-1])
    stains = [{"label": name, "color": "FF0000"} for name in ("DAPI", "FITC", "Cy3", "Cy5")]
    for count in (2, 3, 4):
        path = write_zarr(tmp_path / f"{count}.zarr", planes[:count], stains[:count])
        with pytest.raises(
            SlideContentError, match=rf"{count}.zarr: {count} separate channels .*'DAPI', 'FITC'.*--channels"
        ):
            open_slide(path)
        np.testing.assert_array_equal(shown(path, channels=(1, 1, 0)), np.moveaxis(planes[[1, 1, 0]], 0, -1))


# --- the setting ---


def test_the_choice_is_kept_with_the_run_and_reaches_every_reader(
    tmp_path: Path,
) -> None:
    planes = noise(4, 256, 320)
    path = write(tmp_path / "a.ome.tif", planes, STAINS["four"][1])
    out = tmp_path / "out"
    settings: dict[str, Any] = {**SMALL, "tissue": "everything"}
    failed = wsi_gradcam.explain(path, model=toy_spec("pooled_linear"), out=tmp_path / "failed", **settings)
    assert "--channels 0,1,2" in failed.failed[0].error
    wsi_gradcam.explain(path, model=toy_spec("pooled_linear"), out=out, channels=(2, 1, 0), **settings)
    slide = open_result(out)[0]
    assert slide.status == "ok"
    with closing(slide.open_slide()) as opened:
        np.testing.assert_array_equal(
            opened.read_level(0, Region(0, 0, 256, 320)), np.moveaxis(planes[[2, 1, 0]], 0, -1)
        )
        y, x = slide.patch_yx(3)
        np.testing.assert_array_equal(slide.patch_image(3), read_region(opened, y, x, 32, 32, 0.5))


def test_the_setting_is_of_three_numbers_and_new_to_no_older_run() -> None:
    assert parse_text({"channels": "2,1,0"}) == {"channels": (2, 1, 0)}
    assert make_settings(channels=(2, 1, 0)).identity()["channels"] == [2, 1, 0]
    assert "channels" not in make_settings().identity()
    for wrong in ((0, 1), (0, 1, -1), "red"):
        with pytest.raises(ConfigError, match="channels"):
            make_settings(channels=wrong)
    with pytest.raises(ConfigError, match=r"--channels is 'a,b,c', expected numbers such as 2,1,0"):
        parse_text({"channels": "a,b,c"})


def test_nothing_is_guessed_of_channels() -> None:
    for described in ([], [Channel()] * 3, [Channel("Red"), Channel("Red"), Channel("Blue")], [Channel("Red")] * 2):
        with pytest.raises(SlideContentError):
            shown_channels(3, described, None)
