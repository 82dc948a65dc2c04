"""Lists name slides and their mpp; whatever is wrong in one is told with its line."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.runs import SMALL, rows_of, toy_spec
from tests.synthetic import strip_mpp, write_marker_slide
from wsi_gradcam.api import explain, preview
from wsi_gradcam.errors import ConfigError, ResumeError, SlideNotFoundError
from wsi_gradcam.inputs.find import SlideEntry, find_slides
from wsi_gradcam.results.run_files import read_run
from wsi_gradcam.results.slide_tables import COLUMNS, OLDEST, read_slides
from wsi_gradcam.results.validation import validate
from wsi_gradcam.run.examining import sample_patches
from wsi_gradcam.run.settings import make_settings


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
        ("slide,mpp\n,0.25\n", ConfigError, "line 2: no slide is given"),
        (
            "slide\na.svs\ngone.svs\n",
            SlideNotFoundError,
            r"line 3: .*gone.svs does not exist; paths are relative to the",
        ),
        ("slide,mpp\na.svs,fine\n", ConfigError, "line 2: mpp 'fine' is not a number"),
        ("slide,mpp\na.svs,352.8\n", ConfigError, "line 2: mpp is 352.8, expected 0.01 to 100 um per pixel"),
        (
            "slide,mpp_y\na.svs,0.5\n",
            ConfigError,
            "line 2: mpp '' is not a number; fill in both mpp_y and mpp_x, or mpp",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, error: type[Exception], said: str) -> None:
    touch(tmp_path, "a.svs")
    with pytest.raises(error, match=rf"list\.csv.*{said}"):
        listed(tmp_path, text)


def test_what_is_no_text_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"slide\n\xff\xfe\n")
    with pytest.raises(ConfigError, match=r"list.csv: not a list of slides .*expected CSV in UTF-8"):
        find_slides([tmp_path / "list.csv"])


@pytest.mark.parametrize("name", ["list.csv", "list.parquet"])
def test_a_list_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).write_bytes(b"slide")

    def closed(path: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(ConfigError, match=rf"{name}: not a list of slides \(PermissionError: .*Permission denied"):
        find_slides([tmp_path / name])


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
    assert "holds results at mpp (0.5, 0.5), but the slide's is (0.4, 0.4)" in record.error
    assert ResumeError.__name__ not in record.error


class TestParquet:
    def same(self, folder: Path, columns: dict[str, Any], text: str) -> None:
        """Whether a Parquet list says what a CSV list says."""
        pq.write_table(pa.table(columns), folder / "list.parquet")
        assert facts(find_slides([folder / "list.parquet"])) == facts(listed(folder, text))

    def test_texts_and_numbers_with_gaps(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.svs", "deep/b.svs", "c.svs")
        columns = {
            "slide": ["a.svs", "deep/b.svs", "c.svs"],
            "mpp": [0.25, None, float("nan")],
            "site": ["x", None, " y "],
            "label": pa.array([1.0, None, 2.5]),
            "scanner": pa.array([7, None, 8], pa.int8()),
            "other": [[1], [], None],
        }
        self.same(tmp_path, columns, "slide,mpp,site,label,scanner\na.svs,.25,x,1,7\ndeep/b.svs\nc.svs,,y,2.5,8\n")

    def test_other_types_of_text(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.svs", "b.svs")
        columns = {
            "slide": pa.array([b"a.svs", b"b.svs"]),
            "site": pa.array(["x", "x"]).dictionary_encode(),
            "mpp_y": pa.array(["0.5", ""]),
            "mpp_x": pa.array([0.25, None], pa.float32()),
        }
        self.same(tmp_path, columns, "slide,site,mpp_y,mpp_x\na.svs,x,0.5,0.25\nb.svs,x,,\n")

    def test_what_is_wrong_is_told_with_its_row(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.svs")
        path = tmp_path / "list.parquet"
        for columns, said in (
            ({"path": ["a.svs"]}, "no column 'slide'; expected the columns slide"),
            ({"slide": pa.array([], pa.string())}, "no slide in this list"),
            ({"slide": ["a.svs", None]}, "row 2: no slide is given"),
            ({"slide": ["a.svs"], "mpp": [352.8]}, "row 1: mpp is 352.8"),
        ):
            pq.write_table(pa.table(columns), path)
            with pytest.raises(ConfigError, match=rf"list\.parquet.*{said}"):
                find_slides([path])
        path.write_bytes(b"slide\na.svs\n")
        with pytest.raises(ConfigError, match=r"list\.parquet: not a list of slides .*expected a Parquet file"):
            find_slides([path])


class TestWhatIsTold:
    def test_every_column_is_carried(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.svs", "masks/a.png")
        (found,) = listed(
            tmp_path, "scanner,site,label,mask,patient,slide,x\nS360,Hull,tumour,masks/a.png,p7,a.svs,1\n"
        )
        assert found.patient == "p7"
        assert facts([found]) == [("a.svs", None, str(tmp_path / "masks/a.png"), "tumour", "Hull", "S360")]

    def test_what_is_told_last_holds_and_what_is_not_told_stays(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.svs")
        for name, text in (("1.csv", "slide,mpp,site\na.svs,0.25,x\n"), ("2.csv", "slide,mpp,label\na.svs,0.5,y\n")):
            (tmp_path / name).write_text(text)
        (found,) = find_slides([tmp_path / "1.csv", tmp_path / "2.csv", tmp_path])
        assert facts([found]) == [("a.svs", (0.5, 0.5), "", "y", "x", "")]

    @pytest.mark.parametrize(
        ("mask", "said"),
        [
            ("none.png", r"line 2: mask .*none\.png is not a file; paths are"),
            ("s3://b/m.png", "mask s3://b/m.png is a URL"),
        ],
    )
    def test_a_mask_that_is_not_there_is_told_with_its_line(self, tmp_path: Path, mask: str, said: str) -> None:
        touch(tmp_path, "a.svs")
        with pytest.raises(ConfigError, match=said):
            listed(tmp_path, f"slide,mask\na.svs,{mask}\n")

    def test_home_is_known(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        touch(tmp_path, "home/a.svs", "home/m.png", "lists/x")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        (found,) = listed(tmp_path / "lists", "slide,mask\n~/a.svs,~/m.png\n")
        assert (found.id, found.path, found.mask) == (
            "a.svs",
            str(tmp_path / "home/a.svs"),
            str(tmp_path / "home/m.png"),
        )


class TestRuns:
    @pytest.fixture
    def archive(self, tmp_path: Path) -> Path:
        """a.tif to c.tif; of a the left half is the list's mask, of masks/ all slides have their upper half."""
        (tmp_path / "masks").mkdir()
        for name in ("a", "b", "c"):
            write_marker_slide(tmp_path / f"{name}.tif", 256, 512, mpp=0.25, markers=[], marker_px=16)
            Image.fromarray(np.array([[255] * 4, [0] * 4], np.uint8)).save(tmp_path / "masks" / f"{name}.png")
        Image.fromarray(np.array([[255, 0]], np.uint8)).save(tmp_path / "left.png")
        (tmp_path / "list.csv").write_text(
            "slide,mask,label,site,scanner\na.tif,left.png,tumour,Hull,S360\nb.tif,,,,\nc.tif,,,York,\n"
        )
        return tmp_path

    def test_a_slides_own_mask_goes_before_the_runs(self, archive: Path) -> None:
        settings = {**SMALL, "tissue": "everything", "min_tissue": 0.9}
        left = {(y, x) for y in range(0, 256, 64) for x in range(0, 256, 64)}
        upper = {(y, x) for y in (0, 64) for x in range(0, 512, 64)}
        explain(archive / "list.csv", toy_spec("pooled_linear"), archive / "out", **settings, mask=archive / "masks")
        assert [places(archive / "out", name) for name in ("a.tif", "b.tif")] == [left, upper]
        explain(archive / "list.csv", toy_spec("pooled_linear"), archive / "own", **settings)
        assert places(archive / "own", "a.tif") == left
        assert len(places(archive / "own", "b.tif")) == 32
        found = preview(archive / "list.csv", toy_spec("pooled_linear"), archive / "none", **settings)
        assert {e.slide.id: e.patches for e in found.estimates} == {"a.tif": 16, "b.tif": 32, "c.tif": 32}
        for folder in ("out", "own"):
            assert validate(archive / folder) == []

    def test_patches_for_the_choice_of_an_engine_are_of_the_mask(self, archive: Path) -> None:
        entries = find_slides([archive / "list.csv"])
        settings = make_settings(**{**SMALL, "tissue": "everything", "min_tissue": 0.9})
        patches = sample_patches(entries, settings, (32, 32), 0.5, 100)
        assert patches is not None
        assert len(patches) == 16

    def test_another_mask_is_refused_and_one_that_moved_is_not(self, archive: Path) -> None:
        path, model, out = archive / "list.csv", toy_spec("pooled_linear"), archive / "out"
        explain(path, model, out, **SMALL)
        (archive / "left.png").rename(archive / "moved.png")
        path.write_text(path.read_text().replace("left.png", "moved.png"))
        assert all(record.skipped for record in explain(path, model, out, **SMALL).records)
        path.write_text(path.read_text().replace("moved.png", "masks/a.png"))
        (failed,) = explain(path, model, out, **SMALL).failed
        assert "holds results with a different mask" in failed.error

    def test_one_mask_for_the_only_slide_without_is_enough(self, archive: Path) -> None:
        path = archive / "list.csv"
        path.write_text("slide,mask\na.tif,left.png\nb.tif,\n")
        explain(path, toy_spec("pooled_linear"), archive / "out", **SMALL, mask=archive / "masks" / "b.png")
        assert {name: row["status"] for name, row in rows_of(archive / "out").items()} == {"a.tif": "ok", "b.tif": "ok"}
        path.write_text("slide\na.tif\n")
        with pytest.raises(ConfigError, match="give the mask with --mask"):
            explain(path, toy_spec("pooled_linear"), archive / "other", **SMALL, include="tumour")

    def test_labels_are_written_down_and_change_no_result(self, archive: Path) -> None:
        path, out = archive / "list.csv", archive / "out"
        explain(path, toy_spec("pooled_linear"), out, **SMALL)
        assert {name: (row["label"], row["site"], row["scanner"]) for name, row in rows_of(out).items()} == {
            "a.tif": ("tumour", "Hull", "S360"),
            "b.tif": ("", "", ""),
            "c.tif": ("", "York", ""),
        }
        digest = read_run(out / "run.yaml")
        path.write_text(path.read_text().replace("tumour", "benign"))
        assert all(record.skipped for record in explain(path, toy_spec("pooled_linear"), out, **SMALL).records)
        assert rows_of(out)["a.tif"]["label"] == "benign"
        assert read_run(out / "run.yaml") == digest

    def test_results_of_an_older_version_go_on(self, archive: Path) -> None:
        path, out = archive / "list.csv", archive / "out"
        explain(path, toy_spec("pooled_linear"), out, **SMALL)
        rows = rows_of(out)
        old = [{key: row[key] for key in COLUMNS[:OLDEST]} for row in rows.values()]
        with (out / "slides.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS[:OLDEST])
            writer.writeheader()
            writer.writerows(old[:2])
        (out / "slides.jsonl").unlink()
        assert read_slides(out / "slides.csv")["a.tif"] == {**old[0], **dict.fromkeys(COLUMNS[OLDEST:], "")}
        assert all(record.skipped for record in explain(path, toy_spec("pooled_linear"), out, **SMALL).records)
        assert {**rows_of(out), "c.tif": rows["c.tif"]} == rows


def facts(slides: list[SlideEntry]) -> list[tuple[Any, ...]]:
    return [(s.id, s.mpp, s.mask, s.label, s.site, s.scanner) for s in slides]


def places(out: Path, slide: str) -> set[tuple[int, int]]:
    table = pq.read_table(out / slide / "patches.parquet")
    return set(zip(table["y"].to_pylist(), table["x"].to_pylist(), strict=True))


FORMS = {
    "commas": ('slide,mpp,site\na.svs,"0,25",x\n"b; c.svs",0.5,y\n', "utf-8"),
    "semicolons": (
        "slide;mpp;site\r\na.svs;0,25;x\r\nb\\; c.svs;0.5;y\r\n".replace("b\\; c.svs", '"b; c.svs"'),
        "utf-8",
    ),
    "semicolons, BOM": ('"slide";"mpp";"site"\r\n"a.svs";"0,25";"x"\r\n"b; c.svs";"0.5";"y"\r\n', "utf-8-sig"),
    "tabs, Unicode text": ('slide\tmpp\tsite\r\na.svs\t0,25\tx\r\n"b; c.svs"\t0.5\ty\r\n', "utf-16"),
    "tabs, no BOM": ("slide\tmpp\tsite\na.svs\t,25\tx\nb; c.svs\t0.5\ty\n", "utf-16-le"),
    "big endian": ("site\tslide\tmpp\nx\ta.svs\t0,25\ny\tb; c.svs\t0.5\n", "utf-16-be"),
    "said first": ('sep=;\nslide;mpp;site\na.svs;0,25;x\n"b; c.svs";,5;y\n;;\n', "utf-8"),
    "old line ends": ('slide;mpp;site;\ra.svs;0,25;x;;\r"b; c.svs";0.5;y\r', "utf-8"),
    "an odd column": ('\n"a, b";slide;mpp;size, mm;site\n1;a.svs;0,25;1,5;x\n;"b; c.svs";0.5;;y\n', "utf-8"),
}


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".txt"])
@pytest.mark.parametrize("form", FORMS)
def test_whatever_spreadsheets_separate_cells_with_is_read(tmp_path: Path, form: str, ending: str) -> None:
    touch(tmp_path, "a.svs", "b; c.svs")
    text, encoding = FORMS[form]
    (tmp_path / f"list{ending}").write_bytes(text.encode(encoding))
    found = find_slides([tmp_path / f"list{ending}"])
    assert [(each.id, each.mpp, each.site) for each in found] == [
        ("a.svs", (0.25, 0.25), "x"),
        ("b; c.svs", (0.5, 0.5), "y"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("slide,mpp;site\na.svs,0.5;x\n", "first line 'slide,mpp;site' mixes separators; expected commas"),
        ("slide;mpp,mask\na.svs;0.5,x\n", "mixes separators"),
        ("slide\tmpp;site\na.svs\t0.5;x\n", "mixes separators"),
        ("slide;x,slide\na.svs;x,a.svs\n", "mixes separators"),
        (
            "slide,mpp\na.svs,0,25\n",
            "line 2: 3 cells, expected 2 as in the first line; quote cells that contain ','",
        ),
        ("slide\na, b.svs\n", "line 2: 2 cells, expected 1"),
        ("slide;mpp\na.svs;1.000,5\n", "line 2: mpp '1.000,5' is not a number"),
        ("slide,mpp,slide\na.svs,1,a.svs\n", "has two columns 'slide'; remove one"),
        ("slide,mpp\n" + "a" * (1 << 21) + ",1\n", "a line of more than 1,048,576 characters"),
    ],
)
def test_cells_are_not_guessed(tmp_path: Path, text: str, said: str) -> None:
    touch(tmp_path, "a.svs", "a")
    with pytest.raises(ConfigError, match=rf"list\.csv.*{said}"):
        listed(tmp_path, text)


def test_every_line_counts(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs")
    with pytest.raises(SlideNotFoundError, match=r"line 6: .*gone"):
        listed(tmp_path, "\nsep=;\nslide;mpp\n\na.svs;\ngone.svs;\n")
