"""Slides of which only a part was scanned: masks and exports in the frame of the whole and of that part."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from tests.runs import SMALL, toy_spec
from wsi_gradcam import explain, open_result
from wsi_gradcam.errors import AnnotationError
from wsi_gradcam.export import export
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides import open_slide
from wsi_gradcam.slides.openslide_reader import _bounds
from wsi_gradcam.tissue.annotations import in_frame, read_regions

SIZE, BOUNDS = (2560, 3072), Region(512, 640, 1536, 2048)
NM = 500
MARGIN = 256  # of glass within the bounds
XML = """<?xml version="1.0" encoding="utf-8"?>
<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01" uuid="urn:uuid:0">
<collection name="c" uuid="urn:uuid:1" sizeX="{slide_w}" sizeY="{slide_h}"><barcode/>
<image name="macro" uuid="urn:uuid:2"><creationDate>2012-01-01T00:00:00Z</creationDate>
<device model="SCN400" version="1"/><pixels sizeX="460" sizeY="512"><dimension sizeX="460" sizeY="512" r="0" ifd="0"/>
</pixels><view sizeX="{slide_w}" sizeY="{slide_h}" offsetX="0" offsetY="0" spacingZ="0"/>{scan}</image>
<image name="scan" uuid="urn:uuid:3"><creationDate>2012-01-01T00:00:00Z</creationDate>
<device model="SCN400" version="1"/><pixels sizeX="{w}" sizeY="{h}"><dimension sizeX="{w}" sizeY="{h}" r="0" ifd="1"/>
<dimension sizeX="{w4}" sizeY="{h4}" r="1" ifd="2"/></pixels>
<view sizeX="{nm_w}" sizeY="{nm_h}" offsetX="{nm_x}" offsetY="{nm_y}" spacingZ="0"/>{scan}</image>
</collection></scn>"""
SCAN = (
    "<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings><illuminationSettings>"
    "<numericalAperture>0.4</numericalAperture><illuminationSource>brightfield</illuminationSource>"
    "</illuminationSettings></scanSettings>"
)


def write_leica(path: Path) -> Path:
    """A slide of SIZE of which BOUNDS were scanned; tissue fills these but for a margin."""
    texture = np.random.default_rng(1).normal(0, 18, (BOUNDS.height // 8, BOUNDS.width // 8, 1))
    tissue = np.clip(np.array([200, 130, 180]) + texture.repeat(8, 0).repeat(8, 1), 20, 230).astype(np.uint8)
    scan = np.full((BOUNDS.height, BOUNDS.width, 3), 243, np.uint8)
    inner = np.s_[MARGIN:-MARGIN, MARGIN:-MARGIN]
    scan[inner] = tissue[inner]
    facts = {"slide_h": SIZE[0] * NM, "slide_w": SIZE[1] * NM, "h": BOUNDS.height, "w": BOUNDS.width, "scan": SCAN}
    facts |= {"nm_h": BOUNDS.height * NM, "nm_w": BOUNDS.width * NM, "nm_y": BOUNDS.y * NM, "nm_x": BOUNDS.x * NM}
    xml = XML.format(**facts, h4=BOUNDS.height // 4, w4=BOUNDS.width // 4)
    small = np.asarray(Image.fromarray(scan).reduce(4))
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for number, pixels in enumerate((np.full((512, 460, 3), 243, np.uint8), scan, small)):
            px = NM * (1, 1, 4)[number] * 1e-7
            about: dict[str, Any] = {"description": xml} if number == 0 else {}
            writer.write(
                pixels,
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                resolution=(1 / px, 1 / px),
                resolutionunit="CENTIMETER",
                metadata=None,
                **about,
            )
    return path


def geojson(path: Path, y: int, x: int, height: int, width: int) -> Path:
    ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    properties = {"objectType": "annotation", "classification": {"name": "roi"}}
    path.write_text(json.dumps({"type": "Feature", "geometry": geometry, "properties": properties}))
    return path


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_leica(tmp_path_factory.mktemp("leica") / "a.scn")


def laid(slide: Path, mask: Path, frame: str) -> tuple[float, float, float, float]:
    """Top, left, bottom, right of a mask as it is laid on the slide, in level-0 px."""
    tissue: npt.NDArray[np.bool_] = np.zeros((SIZE[0] // 16, SIZE[1] // 16), np.bool_)
    first = (BOUNDS.y + MARGIN) // 16, (BOUNDS.x + MARGIN) // 16
    tissue[first[0] : (BOUNDS.bottom - MARGIN) // 16, first[1] : (BOUNDS.right - MARGIN) // 16] = True
    regions = read_regions(mask, "a.scn")
    assert regions is not None
    with closing(open_slide(slide)) as opened:
        assert opened.info.bounds == BOUNDS
        found = in_frame(regions, tissue, opened.info, frame).mask(SIZE, (SIZE[0] // 16, SIZE[1] // 16))
    ys, xs = np.nonzero(found)
    return ys.min() * 16, xs.min() * 16, ys.max() * 16 + 16, xs.max() * 16 + 16


def test_a_frame_that_is_told_is_taken(slide: Path, tmp_path: Path) -> None:
    mask = geojson(tmp_path / "a.geojson", 800, 960, 320, 320)
    assert laid(slide, mask, "slide") == (800, 960, 1120, 1280)
    assert laid(slide, mask, "bounds") == (1312, 1600, 1632, 1920)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ((288, 272, 320, 320), (800, 912, 1120, 1232)),  # in the bounds: on the whole slide it would begin above them
        ((1344, 1600, 320, 640), (1344, 1600, 1664, 2240)),  # on the slide: in the bounds it would end below them
    ],
)
def test_a_frame_is_found_by_where_the_tissue_is(
    slide: Path, place: tuple[int, int, int, int], expected: tuple[int, ...], tmp_path: Path
) -> None:
    assert laid(slide, geojson(tmp_path / "a.geojson", *place), "auto") == expected


def test_a_frame_that_cannot_be_found_is_asked_for(slide: Path, tmp_path: Path) -> None:
    mask = geojson(tmp_path / "a.geojson", 800, 960, 160, 160)
    with pytest.raises(AnnotationError, match=r"100% of it lies on tissue.*--mask-frame slide or --mask-frame bounds"):
        laid(slide, mask, "auto")


@pytest.mark.parametrize("frame", ["auto", "bounds"])
def test_a_picture_of_the_scanned_part_is_known_by_its_shape(slide: Path, frame: str, tmp_path: Path) -> None:
    picture = np.zeros((BOUNDS.height // 16, BOUNDS.width // 16), np.uint8)
    picture[20:30, 40:60] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert laid(slide, tmp_path / "a.png", frame) == (512 + 320, 640 + 640, 512 + 480, 640 + 960)


def test_a_run_with_a_mask_of_the_bounds_and_its_exports(slide: Path, tmp_path: Path) -> None:
    mask = geojson(tmp_path / "a.geojson", 288, 272, 320, 320)
    explain(slide, toy_spec("pooled_linear"), tmp_path / "out", **SMALL, mask=mask)
    result = open_result(tmp_path / "out")["a.scn"]
    assert result.plan.mask_frame == "bounds"
    assert result.scanned == BOUNDS
    assert "drawn on the scanned part" in result.row["error"]
    assert result.status == "ok"
    table = result.patches
    assert (table.y.min(), table.y.max()) == (800, 1088)
    export(tmp_path / "out", "geojson", tmp_path / "bounds")
    export(tmp_path / "out", "geojson", tmp_path / "slide", frame="slide")
    corners = []
    for name in ("bounds", "slide"):
        found = json.loads((tmp_path / name / "a.scn.patches.geojson").read_text())["features"]
        corners.append(found[0]["geometry"]["coordinates"][0][0])
    assert np.subtract(corners[1], corners[0]).tolist() == [BOUNDS.x, BOUNDS.y]
    export(tmp_path / "out", "qupath", tmp_path / "qupath")
    (script,) = (tmp_path / "qupath").rglob("*.groovy")
    text = script.read_text()
    assert "server.getWidth() == 2048 && server.getHeight() == 1536)\n    image = [640, 512, '.']" in text
    assert "server.getWidth() == 3072 && server.getHeight() == 2560)\n    image = [0, 0, 'whole-slide']" in text
    both = [json.loads((script.parent / f / "patches.geojson").read_text()) for f in ("", "whole-slide")]
    first = [one["features"][0]["geometry"]["coordinates"][0][0] for one in both]
    assert np.subtract(first[1], first[0]).tolist() == [BOUNDS.x, BOUNDS.y]


def coarse(path: Path, mpp: float) -> Path:
    pixels = np.random.default_rng(0).integers(90, 200, (96, 96, 3), np.uint8)
    resolution = (1e4 / mpp, 1e4 / mpp)
    tifffile.imwrite(path, pixels, tile=(32, 32), photometric="rgb", resolution=resolution, resolutionunit="CENTIMETER")
    return path


@pytest.mark.parametrize("mpp", [2.1, 28.97])
def test_a_slide_far_too_coarse_says_so(mpp: float, tmp_path: Path) -> None:
    """Not that the heatmap's stride is wrong."""
    path = coarse(tmp_path / "a.tif", mpp)
    explain(path, toy_spec("pooled_linear"), tmp_path / "out", **SMALL)
    row = open_result(tmp_path / "out")["a.tif"].row
    assert row["status"] == "failed"
    assert f"too coarse for the model: its finest level has {mpp:g} um/px, but the model needs 0.5" in row["error"]
    assert "--allow-upsampling" in row["error"]
    assert "heatmap-stride" not in row["error"]


def test_enlarging_is_told_and_more_of_it_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for mpp, allowed, told in ((0.7, False, ""), (1.0, False, "enlarged 2 times"), (2.5, True, "enlarged 5 times")):
        path, out = coarse(tmp_path / f"{mpp}.tif", mpp), tmp_path / f"{mpp}"
        explain(
            path,
            toy_spec("pooled_linear"),
            out,
            **{**SMALL, "heatmap_stride": 2, "tissue": "everything"},
            allow_upsampling=allowed,
        )
        row = open_result(out)[path.name].row
        assert row["status"] == "ok"
        assert told in row["error"]
        assert bool(row["error"]) == bool(told)
        assert told in caplog.text


def write_ventana(path: Path, first: tuple[int, int], count: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """A slide of which `count` rows and columns of tiles were scanned, from tile `first` on; returns the scan."""
    side, (rows, columns), joints = 256, count, []

    def number(row: int, column: int) -> int:  # from the bottom up, every second row from right to left
        up = rows - row - 1
        return up * columns + (columns - column - 1 if up % 2 else column) + 1

    def joint(direction: str, one: int, other: int) -> str:
        return (
            f'<TileJointInfo Direction="{direction}" FlagJoined="1" Confidence="100" Tile1="{one}" Tile2="{other}" '
            'OverlapX="0" OverlapY="0"/>'
        )

    for row, column in np.ndindex(count):
        here = number(row, column)
        joints += [joint("RIGHT", here, number(row, column + 1))] if column + 1 < columns else []
        joints += [joint("UP", here, number(row - 1, column))] if row else []
    about = (
        f'<EncodeInfo Ver="2"><SlideStitchInfo><ImageInfo AOIScanned="1" AOIIndex="0" NumRows="{rows}" '
        f'NumCols="{columns}" Width="{side}" Height="{side}" Pos-X="0" Pos-Y="0">{"".join(joints)}</ImageInfo>'
        f'</SlideStitchInfo><AoiOrigin><AOI0 OriginX="{first[1] * side}" OriginY="{first[0] * side}"/></AoiOrigin>'
        "</EncodeInfo>"
    )
    scan = np.random.default_rng(0).integers(90, 200, (rows * side // 16, columns * side // 16, 3), dtype=np.uint8)
    scan = scan.repeat(16, 0).repeat(16, 1)
    image = np.full(((first[0] + rows) * side, (first[1] + columns) * side, 3), 255, np.uint8)
    image[first[0] * side :, first[1] * side :] = scan
    scanner = b'<iScan Magnification="20" ScanRes="0.5" Z-layers="1"/>'
    pages = (
        (np.full((300, 200, 3), 240, np.uint8), "Label Image", scanner),
        (image, "level=0 mag=20 quality=95", about.encode()),
        (image[::2, ::2], "level=1 mag=10 quality=95", b""),
    )
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for pixels, description, xml in pages:
            tags = [(700, 1, len(xml), xml, True)] if xml else []
            tiles: dict[str, Any] = {"tile": (side, side), "compression": "deflate"} if "level" in description else {}
            writer.write(pixels, photometric="rgb", description=description, metadata=None, extratags=tags, **tiles)
    return scan


def test_a_slide_of_ventana_begins_where_its_scan_does(tmp_path: Path) -> None:
    """OpenSlide shows the scanned area alone, so that there is one frame only."""
    scan = write_ventana(tmp_path / "a.bif", (2, 3), (3, 4))
    with closing(open_slide(tmp_path / "a.bif")) as slide:
        info = slide.info
        assert (info.vendor, info.height, info.width, info.mpp) == ("ventana", *scan.shape[:2], (0.5, 0.5))
        assert info.bounds in (None, Region(0, 0, info.height, info.width))
        np.testing.assert_array_equal(slide.read_level(0, Region(0, 0, *scan.shape[:2])), scan)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (("100", "200", "300", "400"), Region(100, 200, 300, 400)),  # as of MIRAX
        (("900", "200", "300", "400"), Region(900, 200, 100, 400)),
        (("1000", "200", "300", "400"), None),
        (("100", "200", "0", "400"), None),
        (("100", "200", "x", "400"), None),
        (("100", "200", "300"), None),
    ],
)
def test_bounds_are_those_of_openslide_as_far_as_they_are_on_the_slide(
    told: tuple[str, ...], expected: Region | None
) -> None:
    """MIRAX has no synthetic files: its properties alone stand in."""
    names = [f"openslide.bounds-{name}" for name in ("y", "x", "height", "width")]
    assert _bounds(dict(zip(names, told, strict=False)), (1000, 800)) == expected
