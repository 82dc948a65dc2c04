"""What OpenSlide would say of a TIFF file, where it cannot be asked: the format's name and its maker's properties."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from wsi_gradcam.slides.base import check_mpp, mpp_of_objective
from wsi_gradcam.slides.tiff_info import describe_tiff, page_mpp
from wsi_gradcam.slides.tiff_levels import TOP_LEFT

if TYPE_CHECKING:
    from tifffile import TiffFile

    from wsi_gradcam.slides.base import SlideInfo
    from wsi_gradcam.slides.files import SlideFile
    from wsi_gradcam.slides.tiff_levels import TiffLevel

    Mpp = tuple[float, float] | None

APERIO, GENERIC = "aperio", "generic-tiff"
# What OpenSlide calls the formats that are plain pyramids of tiles. In others tiles overlap, lie elsewhere or are
# left out where there is glass.
PLAIN = frozenset({APERIO, GENERIC})
NO_MPP = "its ImageDescription tells no MPP; give the micrometres per pixel with --mpp"


def vendor_of_tiff(file: TiffFile) -> str | None:
    """OpenSlide's word for the format of a TIFF file; None where it knows none."""
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
    """The facts of a slide in a plain pyramid, those that OpenSlide and our reader give together for a local file."""
    info, vendor = describe_tiff(source, file, levels, mpp), vendor_of_tiff(file)
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
    return mpp_of_objective(info) if trust_objective else info


def aperio_properties(description: str) -> dict[str, str]:
    """The properties that Aperio's software writes behind its own name, with bars between them.

    >>> aperio_properties("Aperio Image Library v11\\n46x32 (240x240) Q=30|AppMag = 20|MPP = 0.4990")
    {'AppMag': '20', 'MPP': '0.4990'}
    """
    pairs = (part.partition("=") for part in description.split("|")[1:])
    return {key.strip(): value.strip() for key, sign, value in pairs if sign}


def aperio_mpp(properties: dict[str, str]) -> tuple[Mpp, str]:
    """Micrometres per pixel (y, x) and an empty string, or None and what is wrong, with the mend."""
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
    """Some scanners write a comma, as OpenSlide knows too."""
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return None
