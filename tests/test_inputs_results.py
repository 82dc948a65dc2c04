"""Results of ours are never slides of the next run, wherever they lie and however they are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.listings import ids, touch
from tests.made_results import CHANNELS, Made, make, steps
from tests.runs import SMALL, command, rows_of, toy_file, toy_spec
from tests.servers import BUCKET, CREDENTIALS, put_folder, s3_server
from tests.synthetic import write_marker_slide
from tests.test_slides_ome_zarr_reader import write as write_zarr
from wsi_gradcam.api import explain, preview
from wsi_gradcam.cli.output import slide_info
from wsi_gradcam.demo.slide import write_slide
from wsi_gradcam.errors import ConfigError, SlideContentError, SlideFormatError
from wsi_gradcam.export import OF_HEATMAPS, export
from wsi_gradcam.inputs.find import find_slides, search_slides
from wsi_gradcam.results.heatmap import HeatmapStore
from wsi_gradcam.slides import open_slide


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """A folder of two slides, with the results of a run of ours in it; the third slide of that run is elsewhere."""
    small = Made((1500, 1300), steps((94, 82)))
    make(tmp_path / "slides" / "results", {"a.tif": small, "in/b.svs": small, "c.ome.zarr": small})
    image = np.full((64, 64, 3), 200, np.uint8)
    tifffile.imwrite(tmp_path / "slides" / "a.tif", image, tile=(64, 64), photometric="rgb")
    touch(tmp_path / "slides", "in/b.svs")
    return tmp_path / "slides"


@pytest.mark.parametrize("place", ["results/exports", "elsewhere/deep"])
@pytest.mark.parametrize("to", OF_HEATMAPS)
def test_exports_are_no_slides(slides: Path, to: str, place: str) -> None:
    export(slides / "results", to, slides / place)
    assert ids(slides) == ["a.tif", "in/b.svs"]
    for pattern in ("**", "**/*", "**/*.*", "**/*.tif", "**/*.tiff", "**/*.zarr", "**/*.png"):
        try:
            found = {slide.id for slide in find_slides([slides / pattern])}
        except ConfigError as error:
            assert "no slide in" in str(error)  # noqa: PT017 - some patterns match results alone
        else:
            assert found <= {"a.tif", "in/b.svs"}


def test_pictures_of_older_versions_are_known_by_where_they_lie(slides: Path) -> None:
    picture = Image.fromarray(np.zeros((9, 9), np.uint8))
    (slides / "results/exports/x").mkdir(parents=True)
    for name in ("results/exports/x/a.0-g.png", "results/a.tif/tissue.png", "results/a.tif/overview.png", "scan.png"):
        picture.save(slides / name)
    assert ids(slides / "**" / "*.png") == ["scan.png"]
    (slides / "x_files/0").mkdir(parents=True)
    picture.save(slides / "x_files/0/0_0.png")
    assert ids(slides / "**" / "*.png") == ["scan.png", "x_files/0/0_0.png"]
    touch(slides, "x.dzi", "x.json")
    assert ids(slides / "**" / "*.png") == ["scan.png"]


def test_heatmaps_and_spreads_are_no_slides_under_any_name(slides: Path) -> None:
    heatmap = slides / "results/a.tif/heatmap.ome.zarr"
    shutil.copytree(heatmap, slides / "a.ome.zarr")
    shutil.copytree(heatmap, slides / "b.zarr")
    spread = slides / "results/audit/a.tif/spread.ome.zarr"
    HeatmapStore.create(spread, "spread", (94, 82), (4.0, 4.0), CHANNELS, {"run": "r", "slide": "s"})
    write_zarr(slides / "true.ome.zarr", np.full((3, 130, 130), 99, np.uint8))
    write_zarr(slides / "plain.zarr", np.full((3, 130, 130), 99, np.uint8))
    assert ids(slides) == ["a.tif", "in/b.svs", "plain.zarr", "true.ome.zarr"]


def test_what_is_left_out_is_told(slides: Path) -> None:
    export(slides / "results", "tiff", slides / "elsewhere")
    (line,) = search_slides([slides]).remarks
    assert line.startswith(
        "left out, because they are results of wsi_gradcam and not slides: 5 (elsewhere/a.tif.0-gradcam-tumour.tif"
    )
    assert line in slide_info(str(slides))["remark 1"]
    shutil.rmtree(slides / "in")
    (slides / "a.tif").unlink()
    with pytest.raises(ConfigError, match=r"no slides in this folder; .*; left out, because they are results of wsi_g"):
        find_slides([slides])


@pytest.mark.parametrize("to", ["tiff", "ome-tiff", "asap", "ome-zarr-0.4", "png"])
def test_results_that_are_named_outright_are_refused_in_one_line(slides: Path, to: str) -> None:
    (path, *_) = export(slides / "results", to, slides / "elsewhere", ["a.tif"])[0].paths
    shutil.copytree(slides / "results/a.tif/heatmap.ome.zarr", slides / "copied.ome.zarr")
    for result in (path, slides / "copied.ome.zarr", slides / "results/a.tif/heatmap.ome.zarr"):
        with pytest.raises(ConfigError, match=rf"{result.name}: an? .* made by wsi_gradcam, not a slide"):
            find_slides([result])
    (slides / "list.csv").write_text(f"slide\na.tif\n{path.relative_to(slides)}\n")
    with pytest.raises(ConfigError, match=rf"list\.csv: .*{path.name}: .* not a slide; give the slide it"):
        find_slides([slides / "list.csv"])


def test_a_heatmap_says_what_it_is(slides: Path) -> None:
    for folder, said in (("", "a heatmap made by wsi_gradcam"), ("/labels/coverage", "labels of an image")):
        with pytest.raises(SlideFormatError, match=rf"{said}.*, .*; give the") as caught:
            open_slide(f"{slides}/results/a.tif/heatmap.ome.zarr{folder}")
        assert "\n" not in str(caught.value)


def test_slides_that_speak_of_us_are_slides(tmp_path: Path) -> None:
    image = np.full((300, 300, 3), 200, np.uint8)
    write_slide(tmp_path / "demo.tif", image, mpp=0.5)  # written by the demo
    tifffile.imwrite(tmp_path / "b.tif", image, description="cut for wsi_gradcam", software="other", photometric="rgb")
    tifffile.imwrite(tmp_path / "c.tiff", image, software="wsi_gradcam 2", description="x" * 9000, photometric="rgb")
    touch(tmp_path, "d.tif", "manifest/plan.json", "exports/e.tif", "audit/f.svs")
    (tmp_path / "g.tif").write_bytes(b"II*\0")
    assert ids(tmp_path) == ["audit/f.svs", "b.tif", "c.tiff", "d.tif", "demo.tif", "exports/e.tif", "g.tif"]


def test_a_run_into_its_own_slides_folder_goes_on_as_it_was(tmp_path: Path) -> None:
    slides, out = tmp_path / "slides", tmp_path / "slides" / "results"
    slides.mkdir()
    write_marker_slide(slides / "a.tif", 300, 400, mpp=0.25, markers=[(100, 200)], marker_px=16)
    model = toy_spec("pooled_linear")
    explain(slides, model, out, **SMALL)
    for to in ("tiff", "ome-tiff", "ome-zarr-0.4", "asap"):
        export(out, to, out / "exports")
    (record,) = explain(slides, model, out, **SMALL).records
    assert (record.slide.id, record.skipped) == ("a.tif", True)
    assert list(rows_of(out)) == ["a.tif"]
    said = preview(slides, model, tmp_path / "new", **SMALL).remarks
    assert [line.partition(":")[0] for line in said] == [
        "left out, because they are results of wsi_gradcam and not slides"
    ]
    log = sorted((out / "log").iterdir())[-1]
    assert any(said[0] in json.loads(line).get("text", line) for line in log.read_text().splitlines())
    shown = command("explain", slides, "--model", toy_file(tmp_path, "pooled_linear"), "--out", out, "--dry-run")
    assert said[0] in shown.stderr
    assert said[0] in unescape((out / "run.html").read_text())


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url:
        yield url


def test_results_in_a_bucket_are_no_slides(slides: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)
    for to in ("tiff", "ome-tiff", "asap", "ome-zarr-0.4"):
        export(slides / "results", to, slides / "elsewhere")
    shutil.copytree(slides / "results/a.tif/heatmap.ome.zarr", slides / "copied.ome.zarr")
    touch(slides, "x.vsi", "@eaDir/a.tif/SYNO.tif", ".snapshot/a.tif")
    put_folder(server, slides, "archive")
    found, local = search_slides([f"s3://{BUCKET}/archive/"]), search_slides([slides])
    assert [entry.id for entry in found.entries] == ["a.tif", "in/b.svs"] == [entry.id for entry in local.entries]
    assert [line.partition("(")[0] for line in found.remarks] == [line.partition("(")[0] for line in local.remarks]
    (name, *_) = (path.name for path in sorted((slides / "elsewhere").iterdir()) if path.suffix == ".tif")
    url = f"s3://{BUCKET}/archive/elsewhere/{name}"
    with pytest.raises(ConfigError, match=rf"{name}: an export made by wsi_gradcam, not a slide; give"):
        search_slides([url])
    with pytest.raises(SlideContentError, match=rf"{name}: an export made by wsi_gradcam, not a slide"):
        open_slide(url)  # as of a list


def test_what_is_passed_over_in_a_local_folder_is_told(tmp_path: Path) -> None:
    touch(
        tmp_path, "a.svs", ".snapshot/a.svs", "@eaDir/b.svs", "$RECYCLE.BIN/x/c.svs", "in/.Trash-1000/d.svs", "._a.svs"
    )
    touch(tmp_path, "b.vsi", "_b_/stack1/frame_t.ets", "in/c.ISYNTAX", "in/d.qptiff", "in/e.vsi")
    found = search_slides([tmp_path])
    assert [entry.id for entry in found.entries] == ["a.svs"]
    unread, folders = found.remarks
    assert unread.startswith(
        "left out, because their formats are not supported (1 .isyntax, 1 .qptiff, 2 .vsi): 4 (b.vsi, in/c.I"
    )
    assert "convert to OME-TIFF or OME-Zarr with isyntax2raw or Philips' own software or bioformats2raw" in unread
    assert (
        folders
        == "not searched, because they are hidden or system folders: 4 ($RECYCLE.BIN, .Trash-1000, .snapshot, ...)"
    )
    assert [entry.id for entry in search_slides([tmp_path / ".snapshot"]).entries] == ["a.svs"]
    assert [entry.id for entry in search_slides([tmp_path / "@eaDir" / "*.svs"]).entries] == ["b.svs"]


def test_a_slide_of_a_format_that_is_not_read_says_so_by_name(tmp_path: Path) -> None:
    write_slide(tmp_path / "b.vsi", np.full((300, 300, 3), 200, np.uint8), mpp=0.5)  # a TIFF, as of Olympus
    (entry,) = find_slides([tmp_path / "b.vsi"])
    with pytest.raises(
        SlideFormatError, match=r"b\.vsi: its pixels are in a folder beside it, which cannot be read; convert"
    ):
        open_slide(entry.path)
