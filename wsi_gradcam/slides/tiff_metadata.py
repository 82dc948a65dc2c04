"""Metadata of TIFF slides: pixel sizes, and where OpenSlide cannot be used, the vendor and properties that it tells."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from tifffile import RESUNIT, TiffFile

from wsi_gradcam.errors import one_line
from wsi_gradcam.slides.base import SlideInfo, check_mpp, make_levels, mpp_from_objective
from wsi_gradcam.slides.tiff_levels import TOP_LEFT

if TYPE_CHECKING:
    from tifffile import TiffPage

    from wsi_gradcam.slides.base import SlideFile
    from wsi_gradcam.slides.tiff_levels import TiffLevel

    Mpp = tuple[float, float] | None


WHITE = (255, 255, 255)
UM_PER_UNIT = {
    RESUNIT.INCH: 25_400.0,
    RESUNIT.CENTIMETER: 10_000.0,
    RESUNIT.MILLIMETER: 1_000.0,
    RESUNIT.MICROMETER: 1.0,
}
# Length units that OME-XML allows, as far as microscopes use them; µ comes as two characters.
UM_PER_OME_UNIT = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
MAX_XML = 1 << 24
SWAPPED = 4  # orientations above it exchange rows and columns


def describe_tiff(
    source: SlideFile, file: TiffFile, levels: list[TiffLevel], mpp: tuple[float, float] | None
) -> SlideInfo:
    """Return the metadata of the slide in `source`, parsed as `file`, with `levels`; `mpp` (y, x) replaces its own."""
    found, problem = (mpp, "") if mpp is not None else tiff_mpp(file)
    if mpp is None and found is not None and levels[0].orientation > SWAPPED:
        found = (found[1], found[0])
    return SlideInfo(
        path=source.name,
        levels=make_levels([level.shown_px for level in levels]),
        mpp=found,
        mpp_problem=problem,
        vendor="ome-tiff" if file.is_ome else "tiff",
        background=WHITE,
        bounds=None,
        digest=source.digest(),
    )


def tiff_mpp(file: TiffFile) -> tuple[tuple[float, float] | None, str]:
    """Return micrometres per stored pixel (y, x) and an empty string, or None and the problem with its mend."""
    if file.is_ome:
        return _ome_mpp(file.ome_metadata or "")
    return page_mpp(file.pages[0])


def page_mpp(page: Any) -> tuple[tuple[float, float] | None, str]:
    """Return the same as `tiff_mpp` by the resolution tags of a page."""
    values = [_resolution(page, axis) for axis in ("YResolution", "XResolution")]
    if None in values:
        return None, "the file says nothing of its resolution; give the micrometres per pixel with --mpp"
    for axis, value in zip("YX", values, strict=True):
        if problem := check_mpp(float(value or 0), f"the pixel size by tag {axis}Resolution"):
            return None, problem
    return (float(values[0] or 0), float(values[1] or 0)), ""


def _resolution(page: TiffPage, name: str) -> float | None:
    """Return micrometres per pixel by a TIFF resolution tag; None where it or its unit is missing."""
    value = page.tags.valueof(name)
    unit = page.tags.valueof("ResolutionUnit", default=RESUNIT.INCH)  # the default of TIFF 6.0
    if unit not in UM_PER_UNIT or not isinstance(value, tuple) or len(value) != 2:
        return None
    pixels, units = value
    return UM_PER_UNIT[unit] / (pixels / units) if pixels and units else 0.0  # digit for digit as OpenSlide


def _ome_mpp(xml: str) -> tuple[tuple[float, float] | None, str]:
    """Return PhysicalSizeY and PhysicalSizeX of the first image (OME-XML 2016-06), as `tiff_mpp` does."""
    if len(xml) > MAX_XML:
        return None, f"its OME-XML of {len(xml):,} characters is too long; give the micrometres per pixel with --mpp"
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        return None, f"its OME-XML cannot be read ({one_line(error)}); give the micrometres per pixel with --mpp"
    pixels = next((e for e in root.iter() if e.tag.rpartition("}")[2] == "Pixels"), None)
    values = []
    for axis in "YX":
        text = None if pixels is None else pixels.get(f"PhysicalSize{axis}")
        if text is None or pixels is None:
            return None, f"the file has no PhysicalSize{axis}; give the micrometres per pixel with --mpp"
        unit = pixels.get(f"PhysicalSize{axis}Unit", "µm")
        try:
            value = float(text) * UM_PER_OME_UNIT[unit]
        except (ValueError, KeyError):
            return None, f"PhysicalSize{axis} is {text!r} {unit!r}, expected a length; give the true value with --mpp"
        if problem := check_mpp(value, f"PhysicalSize{axis}"):
            return None, problem
        values.append(value)
    return (values[0], values[1]), ""


APERIO, GENERIC = "aperio", "generic-tiff"
# OpenSlide's names of formats that are plain pyramids of tiles. In others tiles overlap, have other positions or are
# left out where there is glass.
PLAIN = frozenset({APERIO, GENERIC})
NO_MPP = "its ImageDescription tells no MPP; give the micrometres per pixel with --mpp"


def tiff_vendor(file: TiffFile) -> str | None:
    """Return OpenSlide's name of a TIFF file's format; None where it knows none."""
    first: Any = file.pages[0]
    software = first.software
    marks = {
        "hamamatsu": file.is_ndpi,
        "leica": file.is_scn,
        "ventana": file.is_bif,
        "philips": file.is_philips,
        "trestle": software.startswith("MedScan"),
    }
    if found := next((vendor for vendor, mark in marks.items() if mark), None):
        return found
    if not first.is_tiled:
        return None
    return APERIO if first.description.startswith("Aperio") else GENERIC


def describe_plain(
    source: SlideFile, file: TiffFile, levels: list[TiffLevel], mpp: Mpp, trust_objective: bool
) -> SlideInfo:
    """Return the metadata of a plain pyramid, as OpenSlide and our reader give it together for a local file."""
    info, vendor = describe_tiff(source, file, levels, mpp), tiff_vendor(file)
    first: Any = file.pages[0]
    in_subifds = file.is_ome and bool(first.subifds)  # levels that OpenSlide does not see
    if vendor is None or in_subifds or levels[0].orientation != TOP_LEFT:
        return info
    info = replace(info, vendor=vendor)
    if vendor == APERIO:
        known = aperio_properties(first.description)
        found, problem = (mpp, "") if mpp is not None else aperio_mpp(known)
        info = replace(info, mpp=found, mpp_problem=problem, objective=_objective(known))
    elif mpp is None and (tagged := page_mpp(first))[0] is not None:  # before OME-XML's
        info = replace(info, mpp=tagged[0], mpp_problem="")
    return mpp_from_objective(info) if trust_objective else info


def aperio_properties(description: str) -> dict[str, str]:
    """Return the properties that Aperio's software writes after its own name, separated by bars.

    >>> aperio_properties("Aperio Image Library v11\\n46x32 (240x240) Q=30|AppMag = 20|MPP = 0.4990")
    {'AppMag': '20', 'MPP': '0.4990'}
    """
    pairs = (part.partition("=") for part in description.split("|")[1:])
    return {key.strip(): value.strip() for key, sign, value in pairs if sign}


def aperio_mpp(properties: dict[str, str]) -> tuple[Mpp, str]:
    """Return micrometres per pixel (y, x) and an empty string, or None and the problem with its mend."""
    if "MPP" not in properties:
        return None, NO_MPP
    value = _number(properties["MPP"])
    if value is None:
        return None, f"MPP is {properties['MPP']!r}, expected a number; give the true value with --mpp"
    if problem := check_mpp(value, "MPP"):
        return None, problem
    return (value, value), ""


def _objective(properties: dict[str, str]) -> float | None:
    power = _number(properties.get("AppMag", ""))
    return power if power is not None and 0 < power < float("inf") else None


def _number(text: str) -> float | None:
    """Return a number, also one with a decimal comma, as some scanners write."""
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return None
