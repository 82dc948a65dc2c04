"""Lists name slides and their mpp; whatever is wrong in one is told with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import SMALL, rows_of, toy_spec
from tests.synthetic import strip_mpp, write_marker_slide
from wsi_gradcam.api import explain
from wsi_gradcam.errors import ConfigError, ResumeError, SlideNotFoundError
from wsi_gradcam.inputs import SlideEntry, find_slides


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def listed(folder: Path, text: str, encoding: str = "utf-8") -> list[SlideEntry]:
    path = folder / "list.csv"
    path.write_text(text, encoding=encoding)
    return find_slides([path])


def test_slides_and_their_mpp_are_read(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "deep/b.tif", "c.tif", "d.tif")
    found = listed(tmp_path, "slide,mpp,site\na.svs,0.25,x\ndeep/b.tif,,y\nc.tif, 0.5,\n")
    assert found == [
        SlideEntry("a.svs", str(tmp_path / "a.svs"), (0.25, 0.25)),
        SlideEntry("c.tif", str(tmp_path / "c.tif"), (0.5, 0.5)),
        SlideEntry("deep/b.tif", str(tmp_path / "deep/b.tif"), None),
    ]


def test_axes_may_differ(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "b.svs")
    found = listed(tmp_path, "slide,mpp_y,mpp_x\na.svs,0.25,0.3\nb.svs,,\n")
    assert [slide.mpp for slide in found] == [(0.25, 0.3), None]


def test_what_spreadsheets_write_is_read(tmp_path: Path) -> None:
    touch(tmp_path, "a, b.svs")
    (slide,) = listed(tmp_path, 'slide,mpp\r\n"a, b.svs",0.25\r\n\r\n', "utf-8-sig")
    assert (slide.id, slide.mpp) == ("a, b.svs", (0.25, 0.25))


def test_slides_elsewhere_are_named_by_their_names(tmp_path: Path) -> None:
    touch(tmp_path, "archive/1/a.svs", "archive/2/b.svs", "lists/x")
    text = f"slide\n../archive/1/a.svs\n{tmp_path}/archive/2/b.svs\n"
    assert [slide.id for slide in listed(tmp_path / "lists", text)] == ["a.svs", "b.svs"]


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    touch(tmp_path, "archive/1/a.svs", "archive/2/a.svs", "lists/x")
    text = "slide\n../archive/1/a.svs\n../archive/2/a.svs\n"
    assert [slide.id for slide in listed(tmp_path / "lists", text)] == ["1/a.svs", "2/a.svs"]


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("", ConfigError, "no column 'slide' in its first line; expected the columns slide"),
        ("path,mpp\na.svs,1\n", ConfigError, "no column 'slide'"),
        ("slide,mpp\n", ConfigError, "no slide in this list"),
        ("slide,mpp\n,0.25\n", ConfigError, "line 2: no slide named"),
        ("slide\na.svs\ngone.svs\n", SlideNotFoundError, r"line 3: .*gone.svs does not exist; paths start at the"),
        ("slide,mpp\na.svs,fine\n", ConfigError, "line 2: mpp 'fine' is no number"),
        ("slide,mpp\na.svs,352.8\n", ConfigError, "line 2: mpp is 352.8, expected 0.01 to 100 um per pixel"),
        ("slide,mpp_y\na.svs,0.5\n", ConfigError, "line 2: mpp '' is no number; give both mpp_y and mpp_x, or mpp"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, error: type[Exception], said: str) -> None:
    touch(tmp_path, "a.svs")
    with pytest.raises(error, match=rf"list\.csv.*{said}"):
        listed(tmp_path, text)


def test_what_is_no_text_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"slide\n\xff\xfe\n")
    with pytest.raises(ConfigError, match=r"list.csv: not a list of slides .*expected CSV in UTF-8"):
        find_slides([tmp_path / "list.csv"])


def test_the_lists_mpp_is_what_a_run_uses(tmp_path: Path) -> None:
    slide = write_marker_slide(tmp_path / "b.tif", 300, 400, mpp=0.25, markers=[(100, 200)], marker_px=16).path
    strip_mpp(slide, tmp_path / "a.tif")
    path, out = tmp_path / "list.csv", tmp_path / "out"
    path.write_text("slide,mpp\na.tif,0.5\nb.tif,\n")
    explain(path, toy_spec("pooled_linear"), out, **SMALL)
    rows = rows_of(out)
    assert (rows["a.tif"]["mpp_y"], rows["b.tif"]["mpp_y"]) == ("0.5", "0.25")
    assert int(rows["a.tif"]["patches"]) > 3 * int(rows["b.tif"]["patches"])
    path.write_text("slide,mpp\na.tif,0.4\n")
    (record,) = explain(path, toy_spec("pooled_linear"), out, **SMALL).records
    assert record.status == "failed"
    assert "holds results at mpp (0.5, 0.5), the slide's is (0.4, 0.4)" in record.error
    assert ResumeError.__name__ not in record.error
