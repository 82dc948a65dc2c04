"""Exports of whole runs: which slides, which windows, nothing half-written, nothing overwritten."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps

from tests.made_results import Made, make, steps
from wsi_gradcam.cli import output
from wsi_gradcam.cli.main import main
from wsi_gradcam.errors import ConfigError, StoreError, UnknownNameError
from wsi_gradcam.export import OF_HEATMAPS, Options, arrays, export
from wsi_gradcam.export.job import Job, atomic_path
from wsi_gradcam.results.display import Colouring
from wsi_gradcam.results.run import open_result

LABEL = "gradcam: tumour"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Slides a.svs, in/b.svs, and c.svs that failed."""
    small = Made((1500, 1300), steps((94, 82)))
    large = Made((1500, 2100), steps((94, 132), seed=1))
    return make(
        tmp_path / "out", {"a.svs": small, "in/b.svs": large, "c.svs": Made((9, 9), small.draw, status="failed")}
    )


def names(folder: Path) -> list[str]:
    """Files below a folder, not those in images that are folders, nor the listing."""
    inside = (".zarr/", "_files/", ".qupath/")
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(n for n in found if n not in (".lock", "exports.json") and not any(part in n for part in inside))


def test_all_finished_slides_are_exported(out: Path, tmp_path: Path) -> None:
    told: list[str] = []
    done = export(out, "tiff", tmp_path / "dest", listener=lambda each: told.append(each.slide))
    assert [each.slide for each in done] == told == ["a.svs", "in/b.svs"]
    assert names(tmp_path / "dest") == ["a.svs.0-gradcam-tumour.tiff", "in/b.svs.0-gradcam-tumour.tiff"]
    assert [path for each in done for path in each.paths] == sorted((tmp_path / "dest").rglob("*.tiff"))


def test_slides_and_channels_are_chosen(out: Path, tmp_path: Path) -> None:
    channel = ("tumour", "probability: tumour", LABEL)
    export(open_result(out), "tiff", tmp_path / "dest", ["in/b.svs"], channel=channel)
    assert names(tmp_path / "dest") == ["in/b.svs.0-gradcam-tumour.tiff", "in/b.svs.2-probability-tumour.tiff"]


@pytest.mark.parametrize("to", OF_HEATMAPS)
def test_what_exists_is_not_overwritten_unless_told(out: Path, tmp_path: Path, to: str) -> None:
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(tmp_path.glob("dest/**/*")) if path.is_file()}

    (first,) = export(out, to, tmp_path / "dest", ["a.svs"])
    assert first.error == ""
    before = contents()
    (again,) = export(out, to, tmp_path / "dest", ["a.svs"], alpha=0.3)
    assert "exists already; use --overwrite" in again.error
    assert contents() == before
    (third,) = export(out, to, tmp_path / "dest", ["a.svs"], overwrite=True, window=(0, 5), threshold=1.0)
    assert third.error == ""
    assert set(contents()) >= set(first.paths) & before.keys()
    assert not [path for path in contents() if "partial" in str(path)]
    if to != "ome-tiff":
        assert contents() != before


def test_a_slide_that_cannot_be_read_does_not_stop_the_others(out: Path, tmp_path: Path) -> None:
    (out / "a.svs" / "heatmap.ome.zarr" / "zarr.json").write_text("{")
    first, second = export(out, "tiff", tmp_path / "dest")
    assert first.error
    assert (second.error, first.paths) == ("", ())
    assert names(tmp_path / "dest") == ["in/b.svs.0-gradcam-tumour.tiff"]


def test_a_slide_that_is_not_finished_is_not_exported(out: Path, tmp_path: Path) -> None:
    (out / "a.svs" / "manifest" / "done.json").unlink()
    unfinished, failed = export(out, "tiff", tmp_path / "dest", ["a.svs", "c.svs"])
    assert "run explain again" in unfinished.error
    assert "c.svs: is failed" in failed.error
    assert names(tmp_path / "dest") == []


def test_an_export_that_breaks_leaves_nothing(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("power cut")
        yield

    monkeypatch.setattr(arrays, "_tiles", broken)
    (done,) = export(out, "tiff", tmp_path / "dest", ["in/b.svs"])
    assert "power cut" in done.error
    assert names(tmp_path / "dest") == []


def test_a_disk_that_refuses_stops_it(out: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="there is a file where a folder is needed"):
        export(out, "tiff", tmp_path / "file" / "dest")


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic_path(tmp_path / "x", overwrite=True) as partial:
            partial.mkdir()
            (partial / text).touch()
    assert names(tmp_path) == ["x/new"]
    with suppress(KeyError), atomic_path(tmp_path / "x", overwrite=True) as partial:
        partial.mkdir()
        raise KeyError
    assert names(tmp_path) == ["x/new"]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_large_archive_s_window_tells_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for done in range(1, 251):
        output.print_window_progress(done, 250)
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == [
        "100 of 250 slides read",
        "200 of 250 slides read",
    ]


def test_windows(out: Path, tmp_path: Path) -> None:
    result = open_result(out)
    slide, run = result["a.svs"], result.windows()
    channel = slide.channel(LABEL)
    assert Job(slide, tmp_path, Options(window="slide"), run).window(channel) == (0, 2)
    assert Job(slide, tmp_path, Options(), run).window(channel) == run[LABEL] != (0, 2)
    job = Job(slide, tmp_path, Options(window=(-1.0, 3.0)), run)
    assert (job.window(channel), job.threshold(channel)) == ((-1, 3), 1)
    assert Job(slide, tmp_path, Options(threshold=0.7), run).threshold(channel) == 0.7


def test_colours_are_matplotlib_s() -> None:
    values = (np.arange(-40, 300) / 128).reshape(2, -1).astype(np.float32)
    flags = np.full(values.shape, 2, np.uint8)
    flags[0, :5] = 1
    rgba = Colouring("viridis", 0.0, 2.0, threshold=0.5, alpha=0.5).rgba(values, flags)
    expected = np.round(colormaps["viridis"](np.clip(values / 2, 0, 1)) * 255).astype(np.uint8)
    shown = (flags == 2) & (values >= 0.5)
    assert np.abs(rgba[shown][:, :3].astype(int) - expected[shown][:, :3]).max() <= 1  # it cuts where we round
    assert (rgba[shown][:, 3] == 128).all()
    assert not rgba[~shown].any()


def test_without_a_threshold_cold_tissue_is_seen_through() -> None:
    values = np.array([[-1, 0, 0.25, 0.5, 1, 2]], np.float32)
    alpha = Colouring("inferno", 0.0, 2.0, alpha=0.6).rgba(values, np.full((1, 6), 2, np.uint8))[0, :, 3]
    np.testing.assert_array_equal(alpha, [0, 0, 76, 153, 153, 153])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colormap": "infreno"}, "did you mean inferno"),
        ({"colormap": "?"}, "expected one of matplotlib's"),
        ({"window": "all"}, "expected slide, run, or LOW,HIGH"),
        ({"window": (1, 1)}, "expected LOW below HIGH"),
        ({"alpha": 0.0}, "expected above 0"),
        ({"size": 5}, "expected 16 to"),
    ],
)
def test_wrong_options_are_refused(out: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export(out, "tiff", tmp_path / "dest", **options)
    assert names(tmp_path / "dest") == []


def test_wrong_names_are_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of ome-zarr"):
        export(out, "jpeg", tmp_path)
    with pytest.raises(UnknownNameError, match="no slide 'x'"):
        export(out, "tiff", tmp_path, ["x"])
    with pytest.raises(ConfigError, match=r"no channel 'tumor'; .*did you mean tumour"):
        export(out, "tiff", tmp_path / "new", channel=("tumour", "tumor"))
    assert not (tmp_path / "new").exists()
    empty = make(tmp_path / "none", {"c.svs": Made((9, 9), steps((1, 1)), status="failed")})
    with pytest.raises(ConfigError, match="no slide is finished"):
        export(empty, "tiff", tmp_path)


def test_the_command_line(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dest = str(tmp_path / "dest")
    command = ["export", str(out), "--to", "png", "--dest", dest, "--slide", "a.svs", "--channel", "tumour"]
    assert main([*command, "--window=-1,2", "--size", "100", "--colormap", "magma", "--alpha", "1"]) == 0
    assert capsys.readouterr().out == f"{dest}/a.svs.0-gradcam-tumour.png\n"
    assert main(command) == 1
    assert "error: a.svs: " in capsys.readouterr().err
    assert main([*command, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["paths"] == [f"{dest}/a.svs.0-gradcam-tumour.png"]
    assert main([*command, "--window", "1,x"]) == 2
    assert "expected run, slide, or two numbers" in capsys.readouterr().err
    assert main(["export", "s3://bucket/out", "--to", "png"]) == 2
    assert "--dest" in capsys.readouterr().err
    assert main(["export", str(out), "--to", "tiff"]) == 0
    assert names(out / "exports") == ["a.svs.0-gradcam-tumour.tiff", "in/b.svs.0-gradcam-tumour.tiff"]
