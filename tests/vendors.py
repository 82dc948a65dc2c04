"""Small slides in the formats of scanners that OpenSlide alone reads, with JPEG tiles of which each can be damaged.

Where OpenSlide shows which tile is not told here: the tests find out by damaging one and looking.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
import numpy.typing as npt
import pydicom
import tifffile
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

Rgb = npt.NDArray[np.uint8]
Places = list[tuple[Path, int, int]]  # file, offset and count of each tile

NM = 500
SIDE = 128


def tissue(height: int, width: int, seed: int = 0) -> Rgb:
    """A picture without two equal tiles."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(60, 250, (height // 8, width // 8, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def half(pixels: Rgb, by: int = 2) -> Rgb:
    return np.asarray(Image.fromarray(pixels).reduce(by))


def write_pages(path: Path, pages: list[tuple[Rgb, dict[str, Any]]], **common: Any) -> Path:
    """Write pictures as directories of JPEG tiles; `tile` None in what is said of one makes it a strip."""
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for pixels, about in pages:
            options = {"tile": (SIDE, SIDE), "compression": "jpeg", "photometric": "rgb", "metadata": None}
            writer.write(pixels, **{**options, **common, **about})
    return path


def tiff_tiles(path: Path) -> Places:
    with tifffile.TiffFile(path) as file:
        return [
            (path, offset, count)
            for page in file.pages
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
        ]


def write_generic(folder: Path) -> tuple[Path, Places]:
    picture = tissue(384, 512)
    path = write_pages(folder / "a.tif", [(picture, {}), (half(picture), {"subfiletype": 1})], resolution=(2e4, 2e4))
    return path, tiff_tiles(path)


def write_aperio(folder: Path) -> tuple[Path, Places]:
    picture = tissue(384, 512)
    about = {"description": "Aperio Image Library v1\n512x384 (128x128) JPEG/RGB Q=75|AppMag = 20|MPP = 0.5"}
    path = write_pages(folder / "a.svs", [(picture, about), (half(picture, 4), {})])
    return path, tiff_tiles(path)


SCANNED = (
    "<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings><illuminationSettings>"
    "<numericalAperture>0.4</numericalAperture><illuminationSource>brightfield</illuminationSource>"
    "</illuminationSettings></scanSettings>"
)


def leica_image(name: str, pixels: tuple[int, int], first: int, place: tuple[int, int], size: tuple[int, int]) -> str:
    """The XML of an image of two sizes, from directory `first` on, in nm."""
    (height, width), (y, x) = pixels, place
    dimensions = "".join(
        f'<dimension sizeX="{width // by}" sizeY="{height // by}" r="{number}" ifd="{first + number}"/>'
        for number, by in enumerate((1, 4) if name != "macro" else (1,))
    )
    return (
        f'<image name="{name}" uuid="urn:uuid:{first + 2}"><creationDate>2012-01-01T00:00:00Z</creationDate>'
        f'<device model="SCN400" version="1"/><pixels sizeX="{width}" sizeY="{height}">{dimensions}</pixels>'
        f'<view sizeX="{size[1]}" sizeY="{size[0]}" offsetX="{x}" offsetY="{y}" spacingZ="0"/>{SCANNED}</image>'
    )


def write_leica(folder: Path) -> tuple[Path, Places]:
    """Two parts of a slide of 1024 x 1280 px were scanned."""
    whole, places, size = (1024 * NM, 1280 * NM), ((100 * NM, 132 * NM), (600 * NM, 700 * NM)), (256, 384)
    images = [leica_image("macro", (64, 80), 0, (0, 0), whole)]
    images += [
        leica_image(f"part {number}", size, 1 + 2 * number, place, (size[0] * NM, size[1] * NM))
        for number, place in enumerate(places)
    ]
    xml = (
        '<?xml version="1.0" encoding="utf-8"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01" '
        f'uuid="urn:uuid:0"><collection name="c" uuid="urn:uuid:1" sizeX="{whole[1]}" sizeY="{whole[0]}"><barcode/>'
        f"{''.join(images)}</collection></scn>"
    )
    pages: list[tuple[Rgb, dict[str, Any]]] = [(tissue(64, 80), {"description": xml})]
    for seed in range(len(places)):
        pages += [(tissue(*size, seed), {}), (half(tissue(*size, seed), 4), {})]
    path = write_pages(folder / "a.scn", pages)
    return path, tiff_tiles(path)[1:]


def write_philips(folder: Path, sizes: tuple[int, int] = (384, 512), padded: int = 0) -> tuple[Path, Places]:
    """Levels by 1, 2, 4; `padded` px of black are below and beside each smaller one, which the XML's spacings tell."""
    spacings = "".join(
        '<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" '
        f'Element="0x0030" PMSVR="IDoubleArray">&quot;{by * NM / 1e6:g}&quot; &quot;{by * NM / 1e6:g}&quot;'
        "</Attribute></DataObject>"
        for by in (1, 2, 4)
    )
    xml = (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport"><Attribute '
        'Name="PIM_DP_SCANNED_IMAGES" Group="0x301D" Element="0x1003" PMSVR="IDataObjectArray"><Array><DataObject '
        'ObjectType="DPScannedImage"><Attribute Name="PIM_DP_IMAGE_TYPE" Group="0x301D" Element="0x1004" '
        'PMSVR="IString">WSI</Attribute><Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" Element="0x0030" '
        f'PMSVR="IDoubleArray">&quot;{NM / 1e6:g}&quot; &quot;{NM / 1e6:g}&quot;</Attribute><Attribute '
        'Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE" Group="0x1001" Element="0x8B01" PMSVR="IDataObjectArray">'
        f"<Array>{spacings}</Array></Attribute></DataObject></Array></Attribute></DataObject>"
    )
    picture, pages = tissue(*sizes), []
    for number, by in enumerate((1, 2, 4)):
        pixels = half(picture, by) if by > 1 else picture
        edge = padded if number else 0
        pixels = np.pad(pixels, ((0, edge), (0, edge), (0, 0)))
        pages.append((pixels, {"description": xml} if not number else {"subfiletype": 1}))
    path = write_pages(folder / "a.tiff", pages, software="Philips DP v1.0")
    tiles = tiff_tiles(path)
    return path, tiles[:14] + tiles[15:17] + tiles[18:19] if padded else tiles  # without those of padding alone


def write_trestle(folder: Path) -> tuple[Path, Places]:
    """Tiles overlap by 24 x 16 px, and by 8 x 4 px on the smaller level."""
    picture = tissue(384, 512)
    about = {"description": "Objective Power=20;OverlapsXY=24 16 8 4 ;Background Color=ffffff"}
    pages = [(picture, about), (half(picture), {})]
    path = write_pages(folder / "a.tif", pages, software="MedScan 1", resolution=(0.5, 0.5), resolutionunit=1)
    return path, tiff_tiles(path)


def write_ventana(folder: Path) -> tuple[Path, Places]:
    """Two areas whose tiles overlap; a tile of the smaller level holds two by two of them."""
    areas = {(1, 1): ((3, 2), (0, 500)), (1, 5): ((2, 3), (700, 40))}  # first tile: count, (Pos-X, Pos-Y)
    infos, origins = [], []
    for number, ((first_row, first_column), ((rows, columns), (x, y))) in enumerate(areas.items()):
        infos.append(
            f'<ImageInfo AOIScanned="1" AOIIndex="{number}" NumRows="{rows}" NumCols="{columns}" Width="{SIDE}" '
            f'Height="{SIDE}" Pos-X="{x}" Pos-Y="{y}">{"".join(ventana_joints(rows, columns))}</ImageInfo>'
        )
        origins.append(f'<AOI{number} OriginX="{first_column * SIDE}" OriginY="{first_row * SIDE}"/>')
    about = (
        f'<EncodeInfo Ver="2"><SlideStitchInfo>{"".join(infos)}</SlideStitchInfo>'
        f"<AoiOrigin>{''.join(origins)}</AoiOrigin></EncodeInfo>"
    ).encode()
    scanner = b'<iScan Magnification="20" ScanRes="0.5" Z-layers="1"/>'
    picture = tissue(4 * SIDE, 8 * SIDE)
    pages: list[tuple[Rgb, dict[str, Any]]] = [
        (tissue(64, 64), {"description": "Label Image", "extratags": [(700, 1, len(scanner), scanner, True)]}),
        (picture, {"description": "level=0 mag=20 quality=95", "extratags": [(700, 1, len(about), about, True)]}),
        (half(picture), {"description": "level=1 mag=10 quality=95"}),
    ]
    path = write_pages(folder / "a.bif", pages)
    _, *tiles = tiff_tiles(path)
    scanned = [tile for tile, (row, column) in zip(tiles, np.ndindex(4, 8), strict=False) if ventana_shows(row, column)]
    return path, scanned + tiles[32:]


def ventana_shows(row: int, column: int) -> bool:
    """Whether a tile is in one of the areas of `write_ventana`."""
    return (1 <= row < 4 and 1 <= column < 3) or (1 <= row < 3 and 5 <= column < 8)


def ventana_joints(rows: int, columns: int) -> Iterator[str]:
    def number(row: int, column: int) -> int:  # from the bottom up, every second row from right to left
        up = rows - row - 1
        return up * columns + (columns - column - 1 if up % 2 else column) + 1

    for row, column in np.ndindex(rows, columns):
        others = {"RIGHT": (row, column + 1)} if column + 1 < columns else {}
        others |= {"UP": (row - 1, column)} if row else {}
        for direction, other in others.items():
            yield (
                f'<TileJointInfo Direction="{direction}" FlagJoined="1" Confidence="{90 + row}" '
                f'Tile1="{number(row, column)}" Tile2="{number(*other)}" OverlapX="{6 + row}" OverlapY="{4 + column}"/>'
            )


def write_ndpi(folder: Path) -> tuple[Path, Places]:
    """Each level is one JPEG, of which the first two have restart markers; OpenSlide makes further levels of them."""
    path, picture, places = folder / "a.ndpi", tissue(192, 1024), []
    with path.open("wb") as file:
        file.write(b"II*\0" + struct.pack("<Q", 0))
        link = 4
        for by in (1, 2, 16):
            pixels, made = half(picture, by) if by > 1 else picture, io.BytesIO()
            restarts: dict[str, Any] = {"restart_marker_blocks": 16} if by < 16 else {}
            Image.fromarray(pixels).save(made, "JPEG", quality=90, subsampling=1, **restarts)
            starts, begin = restart_positions(made.getvalue()), file.seek(0, 2)
            file.write(made.getvalue())
            ends = [*starts[1:], len(made.getvalue())]
            places += [(path, begin + start, end - start) for start, end in zip(starts, ends, strict=True)]
            link = ndpi_directory(
                file, link, pixels.shape, by, (begin, len(made.getvalue())), starts if restarts else []
            )
    return path, places


def ndpi_directory(
    file: BinaryIO, link: int, shape: tuple[int, ...], by: int, strip: tuple[int, int], starts: list[int]
) -> int:
    """Append a directory with 64 bits for the next one's place, and 32 more for each value; return where that lies."""
    long_values = {271: b"Hamamatsu\0", 282: struct.pack("<II", 20000, by), 283: struct.pack("<II", 20000, by)}
    long_values |= {65426: struct.pack(f"<{len(starts)}I", *starts)} if starts else {}
    at = {}
    for tag, data in long_values.items():
        at[tag] = file.tell()
        file.write(data)
    entries = [
        (256, 4, 1, shape[1]),
        (257, 4, 1, shape[0]),
        (258, 3, 1, 8),
        (259, 3, 1, 7),
        (262, 3, 1, 6),
        (271, 2, len(long_values[271]), at[271]),
        (273, 4, 1, strip[0]),
        (277, 3, 1, 3),
        (278, 4, 1, shape[0]),
        (279, 4, 1, strip[1]),
        (282, 5, 1, at[282]),
        (283, 5, 1, at[283]),
        (296, 3, 1, 3),
        (65420, 4, 1, 1),
        (65421, 11, 1, int.from_bytes(struct.pack("<f", 20 / by), "little")),
        (65424, 9, 1, 0),
        *([(65426, 4, len(starts), at[65426])] if starts else []),
    ]
    place = file.tell()
    file.write(struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries))
    following = file.tell()
    file.write(bytes(8 + 4 * len(entries)))
    file.seek(link)
    file.write(struct.pack("<Q", place))
    return following


def restart_positions(data: bytes) -> list[int]:
    """Where the parts of a JPEG begin: behind its header, and behind each restart marker."""
    place = 2
    while data[place + 1] != 0xDA:
        place += 2 + struct.unpack_from(">H", data, place + 2)[0]
    first = place + 2 + struct.unpack_from(">H", data, place + 2)[0]
    return [first, *(at + 2 for at in range(first, len(data) - 1) if data[at] == 0xFF and 0xD0 <= data[at + 1] < 0xD8)]


SERIES = "1.2.826.0.1.3680043.8.498.1"


def write_dicom(
    folder: Path, compression: str = "jpeg", sparse: bool = False, levels: tuple[Rgb, ...] = ()
) -> tuple[Path, Places]:
    """A series of two levels, a file each; `sparse` ones say where each frame lies, and leave one out."""
    picture, places = tissue(384, 512), []
    for number, pixels in enumerate(levels or (picture, half(picture))):
        path = folder / f"{number}.dcm"
        frames = [dicom_frame(pixels, row, column, compression) for row, column in dicom_grid(pixels)]
        here = [*dicom_grid(pixels)]
        if sparse:
            frames, here = frames[:1:-1], here[:1:-1]
        data = dicom_level(number, pixels.shape[:2], frames, compression, here if sparse else None)
        data.save_as(path, enforce_file_format=True)
        written = path.read_bytes()
        places += [(path, written.index(frame), len(frame)) for frame in frames]
    return folder / "0.dcm", places


def dicom_grid(pixels: Rgb) -> list[tuple[int, int]]:
    return [*np.ndindex(-(-pixels.shape[0] // SIDE), -(-pixels.shape[1] // SIDE))]


def dicom_frame(pixels: Rgb, row: int, column: int, compression: str) -> bytes:
    tile = pixels[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
    tile = np.pad(tile, ((0, SIDE - tile.shape[0]), (0, SIDE - tile.shape[1]), (0, 0)))
    if compression == "jpeg":
        return bytes(imagecodecs.jpeg8_encode(tile, level=90, subsampling="422"))
    return bytes(imagecodecs.jpeg2k_encode(tile, codecformat="j2k", level=40, mct=True))


def dicom_level(
    number: int,
    size: tuple[int, ...],
    frames: list[bytes],
    compression: str,
    places: list[tuple[int, int]] | None,
    spacing_mm: float | None = None,
) -> Dataset:
    data = Dataset()
    data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
    data.SOPInstanceUID = f"{SERIES}.{number + 1}"
    data.SeriesInstanceUID = SERIES
    data.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE" if not number else "RESAMPLED"]
    data.Modality = "SM"
    data.Rows = data.Columns = SIDE
    data.TotalPixelMatrixRows, data.TotalPixelMatrixColumns = size
    data.TotalPixelMatrixFocalPlanes = 1
    data.NumberOfFrames = len(frames)
    data.SamplesPerPixel, data.PlanarConfiguration, data.PixelRepresentation = 3, 0, 0
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit = 7
    data.PhotometricInterpretation = "YBR_FULL_422" if compression == "jpeg" else "YBR_ICT"
    data.DimensionOrganizationType = "TILED_FULL" if places is None else "TILED_SPARSE"
    measures = Dataset()
    spacing = spacing_mm or NM / 1e6 * 2**number
    measures.PixelSpacing = [spacing, spacing]
    shared = Dataset()
    shared.PixelMeasuresSequence = [measures]
    data.SharedFunctionalGroupsSequence = [shared]
    if places is not None:
        data.PerFrameFunctionalGroupsSequence = [dicom_place(row, column) for row, column in places]
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.file_meta.TransferSyntaxUID = pydicom.uid.UID(
        "1.2.840.10008.1.2.4.50" if compression == "jpeg" else "1.2.840.10008.1.2.4.91"
    )
    data.PixelData = encapsulate(frames)
    data["PixelData"].VR = "OB"
    return data


def dicom_place(row: int, column: int) -> Dataset:
    place = Dataset()
    place.RowPositionInTotalImagePixelMatrix = row * SIDE + 1
    place.ColumnPositionInTotalImagePixelMatrix = column * SIDE + 1
    frame = Dataset()
    frame.PlanePositionSlideSequence = [place]
    return frame


WRITERS: dict[str, Callable[[Path], tuple[Path, Places]]] = {
    "generic-tiff": write_generic,
    "aperio": write_aperio,
    "leica": write_leica,
    "philips": write_philips,
    "philips, padded": lambda folder: write_philips(folder, padded=40),
    "trestle": write_trestle,
    "ventana": write_ventana,
    "hamamatsu": write_ndpi,
    "dicom": write_dicom,
    "dicom, sparse": lambda folder: write_dicom(folder, sparse=True),
    "dicom, jpeg 2000": lambda folder: write_dicom(folder, "jpeg2000"),
}


def spoil(place: tuple[Path, int, int], how: Callable[[bytes], bytes]) -> bytes:
    """Damage a tile in its file; return what it was."""
    path, offset, count = place
    with path.open("r+b") as file:
        file.seek(offset)
        data = file.read(count)
        file.seek(offset)
        file.write(how(data))
    return data
