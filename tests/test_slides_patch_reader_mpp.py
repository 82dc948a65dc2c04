"""Whose word counts for the size of a slide's pixels: the file's, its objective's, a list's, the settings'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from tests.runs import SMALL, rows_of, toy_spec
from tests.synthetic import strip_mpp, write_marker_slide
from wsi_gradcam.api import explain
from wsi_gradcam.errors import MppError
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.run.settings import make_settings
from wsi_gradcam.slides.patch_reader import _WARNED, open_entry

OWN, LISTED, GIVEN = 0.25, 0.3, 0.4


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a slide that tells its mpp, and one that does not."""
    folder = tmp_path_factory.mktemp("slides")
    slide = write_marker_slide(folder / "telling.tif", 300, 400, mpp=OWN, markers=[(100, 200)], marker_px=16)
    strip_mpp(slide.path, folder / "silent.tif")
    return folder


@pytest.mark.parametrize(
    ("name", "listed", "given", "replace", "expected"),
    [
        ("telling", None, None, False, OWN),
        ("telling", LISTED, GIVEN, False, OWN),
        ("telling", None, GIVEN, False, OWN),
        ("telling", LISTED, GIVEN, True, LISTED),
        ("telling", None, GIVEN, True, GIVEN),
        ("telling", None, None, True, OWN),
        ("silent", LISTED, GIVEN, False, LISTED),
        ("silent", None, GIVEN, False, GIVEN),
        ("silent", LISTED, None, True, LISTED),
    ],
)
def test_the_file_comes_first_unless_it_is_to_be_replaced(
    slides: Path, name: str, listed: float | None, given: float | None, replace: bool, expected: float
) -> None:
    entry = SlideEntry(name, str(slides / f"{name}.tif"), None if listed is None else (listed, listed))
    slide = open_entry(entry, make_settings(mpp=given, replace_mpp=replace))
    assert slide.info.mpp_yx == pytest.approx((expected, expected))
    slide.close()


def test_without_any_the_mend_is_named(slides: Path) -> None:
    slide = open_entry(SlideEntry("silent", str(slides / "silent.tif")), make_settings())
    with pytest.raises(MppError, match=r"silent\.tif: .*--mpp"):
        assert slide.info.mpp_yx
    slide.close()


@pytest.mark.parametrize(("trusted", "expected"), [(True, 0.5), (False, GIVEN)])
def test_the_objective_where_trusted_comes_before_what_is_given(trusted: bool, expected: float, tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    tifffile.imwrite(
        path,
        np.zeros((300, 400, 3), np.uint8),
        tile=(240, 240),
        photometric="rgb",
        compression="jpeg",
        metadata=None,
        description="Aperio Image Library v1\n400x300 (240x240)|AppMag = 20",
    )
    slide = open_entry(SlideEntry("a", str(path)), make_settings(mpp=GIVEN, trust_objective=trusted))
    assert slide.info.mpp_yx == (expected, expected)
    slide.close()


def test_an_unused_mpp_is_remarked_once(slides: Path, caplog: pytest.LogCaptureFixture) -> None:
    _WARNED.clear()
    entry = SlideEntry("telling", str(slides / "telling.tif"))
    for given in (GIVEN, GIVEN, OWN * 1.01):
        open_entry(entry, make_settings(mpp=given)).close()
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "telling.tif: the mpp in the file (0.25, 0.25) is used and not the given one (0.4, 0.4), as for all slides "
        "whose files state it; if the files are wrong, use --replace-mpp"
    )


def test_one_flag_mends_the_silent_files_of_an_archive(slides: Path, tmp_path: Path) -> None:
    """In the same OUT, and what is finished stays so."""
    model = toy_spec("pooled_linear")
    assert [record.slide.id for record in explain(slides, model, tmp_path, **SMALL).failed] == ["silent.tif"]
    records = explain(slides, model, tmp_path, **SMALL, mpp=GIVEN).records
    assert {record.slide.id: record.skipped for record in records} == {"silent.tif": False, "telling.tif": True}
    rows = rows_of(tmp_path)
    assert {name: float(row["mpp_y"]) for name, row in rows.items()} == pytest.approx(
        {"silent.tif": GIVEN, "telling.tif": OWN}
    )
    (failed,) = explain(slides / "telling.tif", model, tmp_path, **SMALL, mpp=GIVEN, replace_mpp=True).failed
    assert "holds results at mpp (0.25, 0.25), but the slide's is (0.4, 0.4)" in failed.error
