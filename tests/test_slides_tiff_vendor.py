"""What is said of a TIFF without OpenSlide is what OpenSlide says of it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from tests.synthetic import write_marker_slide
from tests.test_slides_tiff_reader import noise
from wsi_gradcam.errors import SlideFormatError
from wsi_gradcam.slides import SlideInfo, open_slide
from wsi_gradcam.slides.base import LocalFile
from wsi_gradcam.slides.opening import COPY_FIRST, open_tiff_slide, plain_facts
from wsi_gradcam.slides.tiff_metadata import aperio_mpp


def ours(path: Path, trust_objective: bool = False, mpp: Any = None) -> SlideInfo:
    """As a remote slide would be described."""
    with closing(
        open_tiff_slide(LocalFile(path), lambda file, parsed: plain_facts(file, parsed, mpp, trust_objective))
    ) as slide:
        return slide.info


def theirs(path: Path, trust_objective: bool = False, mpp: Any = None) -> SlideInfo:
    with closing(open_slide(path, mpp, trust_objective=trust_objective)) as slide:
        return slide.info


def assert_alike(path: Path, **options: Any) -> None:
    """All but the digest and the words for a missing mpp."""
    found, expected = (replace(each(path, **options), digest="") for each in (ours, theirs))
    assert bool(found.mpp_problem) == bool(expected.mpp_problem)
    assert replace(found, mpp_problem="") == replace(expected, mpp_problem="")


def test_a_real_slide(shared_data: Path) -> None:
    path = shared_data / "slides/aperio/CMU-1-Small-Region.svs"
    assert_alike(path)
    assert_alike(path, mpp=(0.3, 0.4))
    assert ours(path).objective == 20


@pytest.mark.parametrize("trust_objective", [False, True])
@pytest.mark.parametrize(
    "said",
    [
        "AppMag = 20|MPP = 0.499",
        "AppMag = 40",
        "MPP = 0,2502|AppMag = 40,0",
        "MPP = none|AppMag = many",
        "MPP = 0.0|AppMag = 0",
        "MPP=0.25|MPP = 0.5|AppMag=-3",
        "Title|MPP|AppMag = 1e400",
        "",
    ],
)
def test_aperio_descriptions(said: str, trust_objective: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    tifffile.imwrite(
        path,
        noise(300, 400),
        tile=(240, 240),
        photometric="rgb",
        compression="jpeg",
        metadata=None,
        description=f"Aperio Image Library v1\n400x300 (240x240)|{said}",
    )
    assert_alike(path, trust_objective=trust_objective)


@given(st.text(max_size=12))
def test_any_text_as_mpp_is_a_number_or_a_problem(text: str) -> None:
    mpp, problem = aperio_mpp({"MPP": text})
    assert (mpp is None) == bool(problem)
    assert "--mpp" in problem or mpp is not None


@pytest.mark.parametrize("mpp", [(0.25, 0.25), (0.1214, 0.499), (0.3, 1.7)])
def test_a_tiled_tiff(mpp: tuple[float, float], tmp_path: Path) -> None:
    path = write_marker_slide(
        tmp_path / "a.tif", 600, 700, mpp=mpp, markers=[(9, 9)], marker_px=9, downsamples=(2, 4)
    ).path
    assert_alike(path)


@pytest.mark.parametrize(
    "name",
    [
        "tiff/image-tiff-tiled-rgb-u8.tif",
        "tiff/large_image-test_orient0.tif",
        "tiff/image-tiff-planar-rgb-u8.tif",
        "tiff/image-tiff-palette-1c-8b.tiff",
        "tiff/large_image-yb10kx5k.zstd.tiff",
    ],
)
def test_real_tiffs(name: str, shared_data: Path) -> None:
    assert_alike(shared_data / "slides" / name)


@pytest.mark.parametrize(
    ("vendor", "options"),
    [
        ("hamamatsu", {"extratags": [(271, "s", 0, "Hamamatsu", True), (65420, "I", 1, 1, True)]}),
        ("leica", {"description": '<?xml version="1.0"?><scn></scn>'}),
        ("ventana", {"software": "ScanOutputManager 1", "extratags": [(700, "B", 8, b"<iScan/> ", True)]}),
        ("philips", {"software": "Philips DP v1.0", "description": "<?xml?><DataObject></DataObject>"}),
        ("trestle", {"software": "MedScan 1"}),
    ],
)
def test_formats_that_are_no_plain_pyramids_are_refused(vendor: str, options: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(300, 400), tile=(128, 128), photometric="rgb", metadata=None, **options)
    with pytest.raises(SlideFormatError, match=f"a.tif: in {vendor}'s format, .*{COPY_FIRST}"):
        ours(path)
