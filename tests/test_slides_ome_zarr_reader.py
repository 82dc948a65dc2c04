"""OME-Zarr images of either version are slides; what is missing in them is never black."""

from __future__ import annotations

import json
import pickle
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import numpy.typing as npt
import pytest
import zarr
from numcodecs.errors import UnsafeDecodeError

from tests.runs import SMALL, rows_of, toy_spec
from tests.servers import BUCKET, CREDENTIALS, put_folder, s3_server, web_server
from tests.synthetic import PINK
from wsi_gradcam.api import explain, validate
from wsi_gradcam.cli.output import slide_info
from wsi_gradcam.errors import MppError, SlideError, SlideFormatError, SlideReadError
from wsi_gradcam.geometry import Region
from wsi_gradcam.inputs.find import find_slides
from wsi_gradcam.slides import ome_zarr_reader, open_slide

Rgb = npt.NDArray[np.uint8]
SIZE = (230, 310)


@pytest.fixture
def picture() -> Rgb:
    return np.random.default_rng(0).integers(1, 256, (*SIZE, 3), dtype=np.uint8)


def write(
    path: Path,
    data: npt.NDArray[Any],
    axes: str = "cyx",
    version: str = "0.5",
    scale: float = 0.5,
    unit: str | None = "micrometer",
    levels: int = 2,
    **options: Any,
) -> Path:
    """`data` in the order of `axes`; each level has every second row and column of the one before."""
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    steps = {"y": 2, "x": 2}
    for level in range(levels):
        if level:
            data = data[tuple(slice(None, None, steps.get(axis, 1)) for axis in axes)]
        chunks = tuple({"y": 64, "x": 100}.get(axis, 1) for axis in axes)
        group.create_array(str(level), data=np.ascontiguousarray(data), chunks=chunks, **options)
    kinds = {"c": "channel", "t": "time"}
    units = {"unit": unit} if unit else {}
    described = [{"name": a, "type": kinds.get(a, "space"), **(units if a in "zyx" else {})} for a in axes]
    datasets = [
        {
            "path": str(i),
            "coordinateTransformations": [
                {"type": "scale", "scale": [scale * 2**i if a in "yx" else 1.0 for a in axes]}
            ],
        }
        for i in range(levels)
    ]
    metadata: Any = {"multiscales": [{"axes": described, "datasets": datasets, "version": version}]}
    group.attrs.update({"ome": {"version": version, **metadata}} if version == "0.5" else metadata)
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["cyx", "yxc", "tczyx"])
def test_pixels_and_mpp_are_the_images(version: str, axes: str, picture: Rgb, tmp_path: Path) -> None:
    data = np.moveaxis(picture, -1, 0) if axes != "yxc" else picture
    data = data[None, :, None] if axes == "tczyx" else data
    slide = open_slide(write(tmp_path / "a.ome.zarr", data, axes, version))
    assert slide.info.mpp == (0.5, 0.5)
    assert [(level.height, level.width) for level in slide.info.levels] == [SIZE, (115, 155)]
    padded = np.pad(picture, ((50, 50), (50, 50), (0, 0)), constant_values=255)
    for region in (Region(0, 0, *SIZE), Region(-20, 60, 90, 100), Region(200, 300, 60, 40), Region(500, 0, 5, 5)):
        expected = padded[50 + region.y : 50 + region.bottom, 50 + region.x : 50 + region.right]
        if expected.size:
            np.testing.assert_array_equal(slide.read_level(0, region), expected)
        else:
            assert (slide.read_level(0, region) == 255).all()
    np.testing.assert_array_equal(slide.read_level(1, Region(0, 0, 115, 155)), picture[::2, ::2])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_is_repeated_and_sixteen_bits_scaled(
    dtype: type[np.unsignedinteger[Any]], picture: Rgb, tmp_path: Path
) -> None:
    gray = picture[..., 0]
    path = write(tmp_path / "a.zarr", gray.astype(dtype) * (257 if dtype is np.uint16 else 1), "yx")
    found = open_slide(path).read_level(0, Region(0, 0, *SIZE))
    np.testing.assert_array_equal(found, np.repeat(gray[..., None], 3, axis=2))


@pytest.mark.parametrize(("unit", "scale"), [("nanometer", 250.0), ("millimeter", 0.00025)])
def test_units_are_honoured(unit: str, scale: float, picture: Rgb, tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", picture[..., 0], "yx", unit=unit, scale=scale)
    assert open_slide(path).info.mpp == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize(
    ("unit", "scale", "said"),
    [
        (None, 1.0, "axis y has unit None; give the micrometres per pixel, such as --mpp 0.25"),
        ("micrometer", 352.8, "the scale of axis y is 352.8, expected 0.01 to 100"),
    ],
)
def test_an_image_without_mpp_says_so(unit: str | None, scale: float, said: str, tmp_path: Path) -> None:
    slide = open_slide(write(tmp_path / "a.zarr", np.ones(SIZE, np.uint8), "yx", unit=unit, scale=scale))
    with pytest.raises(MppError, match=f"a.zarr: {said}"):
        _ = slide.info.mpp_yx
    assert open_slide(tmp_path / "a.zarr", 0.5).info.mpp_yx == (0.5, 0.5)


@pytest.mark.parametrize(
    ("data", "axes", "said"),
    [
        (np.ones((4, *SIZE), np.uint8), "cyx", "4 separate channels, as in"),
        (np.ones((3, *SIZE), np.float32), "cyx", "values of float32, expected unsigned 8 or 16 bits"),
        (np.ones((5, *SIZE), np.uint8), "zyx", "expected y, x and colours"),
    ],
)
def test_what_is_no_picture_is_refused(data: npt.NDArray[Any], axes: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SlideFormatError, match=said):
        open_slide(write(tmp_path / "a.zarr", data, axes))


def test_other_zarr_is_refused(tmp_path: Path) -> None:
    zarr.open_group(tmp_path / "a.zarr", mode="w")
    with pytest.raises(SlideFormatError, match=r"a\.zarr: a Zarr group without multiscales"):
        open_slide(tmp_path / "a.zarr")
    (tmp_path / "a.zarr/zarr.json").write_text('{"zarr_format": 3')
    with pytest.raises(SlideFormatError, match=r"a\.zarr: not an OME-Zarr image that can be read"):
        open_slide(tmp_path / "a.zarr")


def test_a_missing_or_damaged_chunk_is_its_own_matter(picture: Rgb, tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", np.moveaxis(picture, -1, 0))
    for channel in range(3):
        (path / f"0/c/{channel}/0/1").unlink()
    (path / "0/c/1/1/0").write_bytes(b"damaged")
    slide = open_slide(path)
    with pytest.raises(SlideReadError, match=r"level 0, x 50, y 0, 60 x 20 px has no data: a chunk is missing"):
        slide.read_level(0, Region(0, 50, 20, 60))
    with pytest.raises(SlideReadError, match=r"level 0, x 0, y 64, 100 x 64 px cannot be decoded"):
        slide.read_level(0, Region(100, 10, 20, 60))
    np.testing.assert_array_equal(slide.read_level(0, Region(0, 0, 64, 100)), picture[:64, :100])


def test_chunks_that_would_fill_the_cache_are_read_in_part(
    picture: Rgb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ome_zarr_reader, "MAX_CHUNK_PX", 100)
    path = write(tmp_path / "a.zarr", np.moveaxis(picture, -1, 0))
    for channel in range(3):
        (path / f"0/c/{channel}/0/1").unlink()
    slide = open_slide(path)
    np.testing.assert_array_equal(slide.read_level(0, Region(70, 30, 90, 150)), picture[70:160, 30:180])
    with pytest.raises(SlideReadError, match="has no data: a chunk is missing"):
        slide.read_level(0, Region(0, 50, 90, 60))


def test_the_digest_tells_images_apart(picture: Rgb, tmp_path: Path) -> None:
    data = np.moveaxis(picture, -1, 0)
    first = open_slide(write(tmp_path / "a.zarr", data)).info.digest
    shutil.copytree(tmp_path / "a.zarr", tmp_path / "b.zarr")
    assert open_slide(tmp_path / "b.zarr").info.digest == first
    assert open_slide(write(tmp_path / "c.zarr", 255 - data)).info.digest != first
    assert open_slide(write(tmp_path / "d.zarr", data, scale=0.25)).info.digest != first


def test_images_are_found_in_folders_and_explained(picture: Rgb, tmp_path: Path) -> None:
    slides, out = tmp_path / "slides", tmp_path / "out"
    write(slides / "deep/a.ome.zarr", np.moveaxis(np.array(PINK, np.uint8) - picture // 16, -1, 0))
    assert [slide.id for slide in find_slides([slides])] == ["deep/a.ome.zarr"]
    assert [slide.id for slide in find_slides([slides / "deep/a.ome.zarr"])] == ["a.ome.zarr"]
    explain(slides, toy_spec("pooled_linear"), out, **SMALL)
    assert rows_of(out)["deep/a.ome.zarr"]["status"] == "ok"
    assert not validate(out)
    with pytest.raises(ValueError, match="no slides in this folder"):
        find_slides([out])  # results are no slides


class _Ran:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


PICKLES: dict[str, dict[str, Any]] = {
    "filter": {"filters": [{"id": "pickle"}], "compressor": None},
    "compressor": {"filters": None, "compressor": {"id": "pickle"}},
    "second filter": {"filters": [{"id": "shuffle", "elementsize": 1}, {"id": "pickle"}], "compressor": None},
    "objects": {"dtype": "|O", "fill_value": None, "filters": [{"id": "pickle"}], "compressor": None},
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_codec_that_unpickles_is_refused_and_runs_nothing(tmp_path: Path, kind: str) -> None:
    """zarr 3.1 refuses such metadata at opening, and numcodecs 0.16.6 to decode."""
    place = write(tmp_path / "a.ome.zarr", np.full((3, 100, 100), 7, np.uint8), version="0.4")
    planted = 0
    for file in place.rglob(".zarray"):
        meta = json.loads(file.read_text(encoding="utf-8")) | PICKLES[kind]
        file.write_text(json.dumps(meta), encoding="utf-8")
        for chunk in file.parent.rglob("*"):
            if chunk.is_file() and not chunk.name.startswith("."):
                chunk.write_bytes(pickle.dumps(_Ran(tmp_path / "ran")))
                planted += 1
    assert planted
    with pytest.raises(SlideError):
        open_slide(place).read_level(0, Region(0, 0, 50, 50))
    assert not (tmp_path / "ran").exists()


def test_the_codec_itself_refuses(tmp_path: Path) -> None:
    with pytest.raises(UnsafeDecodeError):
        numcodecs.Pickle().decode(pickle.dumps(_Ran(tmp_path / "ran")))
    assert not (tmp_path / "ran").exists()


XML = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">{}</OME>'
IMAGE = '<Image ID="Image:{}" Name="{}"><Pixels ID="Pixels:{}" {}/></Image>'
Images = dict[str, tuple[int, int]]


def collection(
    path: Path,
    images: Images,
    version: str = "0.4",
    sizes_um: tuple[float | None, ...] = (),
    listed: bool = True,
    layout: Any = 3,
    **options: Any,
) -> Path:
    """Images by their names, as bioformats2raw writes them; the values of each are its number and more."""
    root = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    about: dict[str, Any] = {"bioformats2raw.layout": layout}
    root.attrs.update({"ome": {"version": version, **about}} if version == "0.5" else about)
    described = []
    for number, (name, size) in enumerate(images.items()):
        rng = np.random.default_rng(number)
        data = rng.integers(1, 256, (1, 3, 1, *size), dtype=np.uint8)
        write(path / str(number), data, "tczyx", version, **options)
        um = sizes_um[number] if number < len(sizes_um) else None
        told = "" if um is None else f'PhysicalSizeX="{um}" PhysicalSizeY="{um}" PhysicalSizeXUnit="µm"'
        described.append(IMAGE.format(number, name, number, told))
    if listed:
        group = root.create_group("OME")
        series = {"series": [str(number) for number in range(len(images))]}
        group.attrs.update({"ome": {"version": version, **series}} if version == "0.5" else series)
        (path / "OME" / "METADATA.ome.xml").write_text(XML.format("".join(described)), encoding="utf-8")
    return path


def first_pixels(size: tuple[int, int]) -> Rgb:
    return np.moveaxis(np.random.default_rng(0).integers(1, 256, (1, 3, 1, *size), dtype=np.uint8)[0, :, 0], 0, -1)


SCAN: Images = {"scan.svs": (400, 500), "label image": (200, 200), "macro image": (150, 380), "": (50, 60)}


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_the_slide_among_a_label_and_a_macro_is_taken(version: str, listed: bool, tmp_path: Path) -> None:
    images = SCAN if listed else {"a": (400, 500), "b": (50, 60), "c": (60, 70)}
    path = collection(tmp_path / "a.zarr", images, version, (0.5, None), listed)
    slide = open_slide(path)
    np.testing.assert_array_equal(slide.read_level(0, Region(0, 0, 400, 500)), first_pixels((400, 500)))
    assert (slide.info.mpp, len(slide.info.images)) == ((0.5, 0.5), len(images))
    assert "500 x 400 px" in slide.info.images[0]
    assert slide_info(str(path))["images"].startswith(
        "0 (scan.svs, 500 x 400 px), 1 (label image" if listed else "0 (500 x 400 px)"
    )
    (entry,) = find_slides([tmp_path])
    assert entry.id == "a.zarr"


@pytest.mark.parametrize(
    "images",
    [
        {"region 1": (300, 300), "region 2": (200, 300)},
        {"small": (60, 60), "scan": (400, 500)},
        {"macro image": (100, 100), "scan": (400, 500), "other": (400, 500)},
        {"scan": (300, 300), "second scan": (140, 140)},
    ],
)
def test_of_several_that_may_be_the_slide_none_is_guessed(images: Images, tmp_path: Path) -> None:
    path = collection(tmp_path / "a.ome.zarr", images)
    said = rf"a\.ome\.zarr: holds {len(images)} images, several of which may be the slide: 0 \(.*, 1 \(.*; give the"
    with pytest.raises(SlideFormatError, match=rf"{said} intended one, such as {path}/0"):
        open_slide(path)
    for number, size in enumerate(images.values()):
        info = open_slide(path / str(number)).info
        assert (info.height, info.width) == size
    (entry,) = find_slides([path / "1"])
    assert entry.id == "a.ome.zarr/1"


def test_pixel_sizes_come_from_the_ome_xml_too(tmp_path: Path) -> None:
    path = collection(tmp_path / "a.zarr", SCAN, sizes_um=(0.25, None), unit=None, scale=1.0)
    assert open_slide(path).info.mpp == open_slide(path / "0").info.mpp == (0.25, 0.25)
    assert open_slide(path / "1").info.mpp is None
    assert open_slide(path, 0.5).info.mpp == (0.5, 0.5)
    other = collection(tmp_path / "b.zarr", SCAN, sizes_um=(0.25, None), scale=0.5)
    with pytest.raises(MppError, match=r"its scales and its OME-XML state different pixel sizes \(y, x: 0.5, 0.5"):
        _ = open_slide(other).info.mpp_yx


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_collections_behind_urls_are_read_alike(version: str, tmp_path: Path) -> None:
    collection(tmp_path / "a.zarr", SCAN, version, (0.25,), unit=None)
    local = open_slide(tmp_path / "a.zarr").info
    with web_server(tmp_path) as web:
        for url in (f"{web.url}/a.zarr", f"{web.url}/a.zarr/0", f"{web.url}/a.zarr/?sign=x"):
            with closing(open_slide(url)) as slide:
                assert (slide.info.mpp, slide.info.levels) == (local.mpp, local.levels)
                expected = first_pixels((400, 500))
                np.testing.assert_array_equal(slide.read_level(0, Region(0, 0, 400, 500)), expected)
        (entry,) = find_slides([f"{web.url}/a.zarr/0"])
        assert entry.id == "a.zarr/0"


def test_collections_in_a_bucket_are_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection(tmp_path / "in/a.zarr", SCAN, "0.5", (0.25,), unit=None)
    with s3_server() as server:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": server}.items():
            monkeypatch.setenv(name, value)
        put_folder(server, tmp_path, "archive")
        (entry,) = find_slides([f"s3://{BUCKET}/archive/"])
        assert entry.id == "in/a.zarr"
        for url in (entry.path, f"{entry.path}/0"):
            with closing(open_slide(url)) as slide:
                assert slide.info.mpp == (0.25, 0.25)
                np.testing.assert_array_equal(slide.read_level(0, Region(0, 0, 400, 500)), first_pixels((400, 500)))


def test_collections_that_claim_too_much_are_refused(tmp_path: Path) -> None:
    path = collection(tmp_path / "a.zarr", {"a": (60, 70)})
    for series, said in (
        (["0"] * 300, "a collection of 300 images, expected 1 to 256"),
        ([], "a collection of no images"),
        (["../b"], r"a list of images .*\.\./b.*, expected paths in the collection"),
        (["0", "7"], "several of which may be the slide: .*7 .a, of unknown size|7 .of unknown size"),
    ):
        (path / "OME/.zattrs").write_text(json.dumps({"series": series}))
        with pytest.raises(SlideFormatError, match=said):
            open_slide(path)
    with pytest.raises(SlideFormatError, match="bioformats2raw layout 2, expected 3"):
        open_slide(collection(tmp_path / "b.zarr", {"a": (60, 70)}, layout=2))
    many = write(tmp_path / "c.zarr", np.ones((90, 90), np.uint8), "yx", "0.4")
    about = json.loads((many / ".zattrs").read_text())
    about["multiscales"][0]["datasets"] *= 100
    (many / ".zattrs").write_text(json.dumps(about))
    with pytest.raises(SlideFormatError, match="200 levels, expected 1 to 64"):
        open_slide(many)
    (many / ".zattrs").write_text(json.dumps({"plate": {"wells": []}}))
    with pytest.raises(SlideFormatError, match="a plate of wells, expected one image"):
        open_slide(many)
    bomb = collection(tmp_path / "d.zarr", {"a": (60, 70)}, unit=None)
    with (bomb / "OME/METADATA.ome.xml").open("wb") as file:
        file.truncate(1 << 30)
    assert open_slide(bomb).info.mpp is None
