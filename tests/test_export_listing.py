"""Exports have a listing with digests: `validate` notices whatever of them was changed, lost or added."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.made_results import Made, make, steps
from tests.runs import ROOT
from wsi_gradcam.cli.main import main
from wsi_gradcam.errors import ConfigError, StoreError
from wsi_gradcam.export import OF_HEATMAPS, export
from wsi_gradcam.results.seals import EXPORTS
from wsi_gradcam.results.validation import check

SEED = 7
WINDOW: dict[str, Any] = {"window": "slide"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two slides, in a folder of its own."""
    slides = {"a.svs": Made((900, 1300), steps((57, 82))), "in/b.svs": Made((700, 900), steps((44, 57), seed=1))}
    return make(tmp_path_factory.mktemp("made") / "out", slides)


@pytest.fixture(scope="module")
def all_formats(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export of each format of heatmaps, to be changed and put back."""
    dest = tmp_path_factory.mktemp("exports") / "dest"
    for to in OF_HEATMAPS:
        done = export(made, to, dest, overwrite=to == "tissuumaps", **WINDOW)  # which has the pictures of `tiff`
        assert {each.error for each in done} == {""}
    return dest


def told(folder: Path) -> list[str]:
    found = check(folder)
    assert (found.notes, found.failed) == ([], [])
    return [finding.problem for finding in found.findings]


def files_in(dest: Path) -> list[str]:
    names = (path.relative_to(dest).as_posix() for path in dest.rglob("*") if path.is_file())
    return sorted(name for name in names if name != ".lock")


def listed(dest: Path) -> dict[str, str]:
    files: dict[str, str] = json.loads((dest / EXPORTS).read_bytes())["files"]
    return files


def test_every_path_of_every_export_is_listed(all_formats: Path) -> None:
    names = listed(all_formats)
    assert told(all_formats) == []
    covered = [name for name in files_in(all_formats) if name in names or any(name.startswith(f"{n}/") for n in names)]
    assert [*covered, EXPORTS] == sorted([*files_in(all_formats)], key=lambda name: name == EXPORTS)
    endings = (".ome.zarr", ".ome.tiff", ".tiff", "_map.tif", ".tmap", ".geojson", ".qupath", ".png", ".dzi", "_files")
    assert [end for end in endings if not any(name.endswith(end) for name in names)] == []


def test_digests_are_those_of_sha256sum(all_formats: Path) -> None:
    names = listed(all_formats)
    file = next(name for name in names if name.endswith(".ome.tiff"))
    assert hashlib.sha256((all_formats / file).read_bytes()).hexdigest() == names[file]
    folder = next(name for name in names if name.endswith(".ome.zarr"))
    command = "find . -type f -printf '%P\\n' | LC_ALL=C sort | xargs -d '\\n' sha256sum | sha256sum"
    found = subprocess.run(["sh", "-c", command], cwd=all_formats / folder, capture_output=True, text=True, check=True)
    assert found.stdout.split()[0] == names[folder]


def test_a_flipped_byte_in_any_file_of_any_export_is_noticed_and_named(all_formats: Path) -> None:
    draw, names = random.Random(SEED), listed(all_formats)
    for name in files_in(all_formats):
        path = all_formats / name
        data = path.read_bytes()
        place = draw.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ draw.randrange(1, 256)]) + data[place + 1 :])
        part = next((n for n in names if name == n or name.startswith(f"{n}/")), name)
        assert [part in problem for problem in told(all_formats)] == [True], (name, place)
        path.write_bytes(data)
    assert told(all_formats) == []


def test_lost_files_and_files_more_in_folders_are_noticed(all_formats: Path) -> None:
    for name in files_in(all_formats):
        path = all_formats / name
        data = path.read_bytes()
        path.unlink()
        if name == EXPORTS:
            with pytest.raises(ConfigError, match=r"has no run\.yaml"):
                check(all_formats)
        else:
            assert len(told(all_formats)) == 1, name
        path.write_bytes(data)
    more = all_formats / "a.svs.ome.zarr/0/0/7/7"
    more.parent.mkdir()
    more.write_bytes(b"a chunk")
    (all_formats / "a.svs.ome.zarr/notes.txt").write_text("of a user")
    assert told(all_formats) == ["a.svs.ome.zarr differs from what was made; export it again"]
    shutil.rmtree(more.parent)
    assert told(all_formats) == []
    (all_formats / "a.svs.ome.zarr/notes.txt").unlink()


def test_exports_inside_out_are_checked_with_it(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(shutil.copytree(made, tmp_path / "out"))
    for dest in ("exports", "for-qupath"):
        assert main(["export", str(out), "--to", "geojson", "--dest", str(out / dest), "--window", "slide"]) == 0
        before = {finding.problem for finding in check(out).findings}
        file = next((out / dest).glob("a.svs.*.geojson"))
        file.write_bytes(file.read_bytes().replace(b"0", b"1", 1))
        problem = f"{dest}/{file.name} differs from what was made; export it again"
        assert {finding.problem for finding in check(out).findings} - before == {problem}
        capsys.readouterr()
        assert main(["validate", str(out / dest)]) == 1
        assert capsys.readouterr().out == f"{out / dest}: {problem.partition('/')[2]}\n1 problem found\n"


def test_exports_of_an_older_version_are_told_and_no_damage(made: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(made, tmp_path / "out"))
    before = check(out).findings
    export(out, "png", out / "exports", ["a.svs"], size=64, **WINDOW)
    (out / "exports" / EXPORTS).unlink()
    assert check(out).findings == before
    assert any("exports" in note and "made by an older version" in note for note in check(out).notes)
    export(out, "png", out / "exports", ["in/b.svs"], size=64, **WINDOW)
    assert check(out).findings == before
    assert f"exports/: 1 files are not in {EXPORTS}, so they were not checked" in check(out).notes


def test_an_export_again_mends_what_was_changed(made: Path, tmp_path: Path) -> None:
    export(made, "deepzoom", tmp_path, **WINDOW)
    (next(tmp_path.glob("a.svs*_files")) / "5/0_0.png").unlink()
    assert len(told(tmp_path)) == 1
    export(made, "deepzoom", tmp_path, ["a.svs"], overwrite=True, alpha=0.3, **WINDOW)
    assert told(tmp_path) == []


def test_a_damaged_listing_is_refused_before_anything_is_written(made: Path, tmp_path: Path) -> None:
    export(made, "png", tmp_path, ["a.svs"], size=64, **WINDOW)
    for data in (b"{}", b"[]", b"\xff", (tmp_path / EXPORTS).read_bytes().replace(b"a.svs", b"b.svs")):
        (tmp_path / EXPORTS).write_bytes(data)
        before = files_in(tmp_path)
        with pytest.raises(StoreError, match="damaged, or none of ours; delete it"):
            export(made, "geojson", tmp_path, **WINDOW)
        assert files_in(tmp_path) == before
        assert told(tmp_path) == [f"{EXPORTS} differs from what was made; delete it and export with --overwrite"]


def test_an_overwriting_export_that_breaks_off_leaves_a_listing_that_holds(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(made, "geojson", tmp_path, **WINDOW)
    before = listed(tmp_path)

    def broken(*_: Any) -> Any:
        raise RuntimeError("power cut")
        yield

    with monkeypatch.context() as patch:
        patch.setattr("wsi_gradcam.export.geojson.region_features", broken)
        done = export(made, "geojson", tmp_path, overwrite=True, frame="slide", **WINDOW)
    assert {"power cut" in each.error for each in done} == {True}
    assert told(tmp_path) == []
    assert listed(tmp_path) == before  # each file is as it was, or has the same bytes in another frame


# Kills itself at a moment that is named by a function, the so-manieth time that it is called.
KILLED = """
import importlib, os, signal, sys
import wsi_gradcam.export.geojson
from wsi_gradcam.export import export, job
place, name, left = sys.argv[4], sys.argv[5], int(sys.argv[6])
owner = importlib.import_module(place.partition(":")[0])
owner = getattr(owner, place.partition(":")[2]) if ":" in place else owner
whole = getattr(owner, name)
def killed(*given, **more):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*given, **more)
setattr(owner, name, killed)
export(sys.argv[1], sys.argv[3], sys.argv[2], window="slide", overwrite=len(sys.argv) > 7)
"""
MOMENTS = {
    "before the digests": ("wsi_gradcam.export.job", "export_digest", 1),
    "between files and journal": ("wsi_gradcam.export.job", "export_digest", 3),
    "between journal and listing": ("wsi_gradcam.export.job:Journal", "_write_listing", 1),
    "within the listing": ("wsi_gradcam.export.job", "sealed_json", 1),
    "with a half-written listing": ("os", "replace", 5),
    "after the listing": ("pathlib:Path", "unlink", 5),
    "in a second slide": ("wsi_gradcam.export.job", "_replace", 3),
}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_export_killed_at_any_moment_is_finished_by_the_same_command(
    made: Path, tmp_path: Path, moment: str, again: bool
) -> None:
    place, name, count = MOMENTS[moment]
    for folder in ("whole", "killed"):
        export(made, "geojson", tmp_path / folder, threshold=0.2, **WINDOW) if again else None
    more = ["again"] if again else []
    command = [sys.executable, "-c", KILLED, str(made), str(tmp_path / "killed"), "geojson", place, name, str(count)]
    assert subprocess.run([*command, *more], cwd=ROOT, check=False).returncode == -signal.SIGKILL
    if (tmp_path / "killed" / EXPORTS).exists():
        found = check(tmp_path / "killed")
        assert found.findings == []  # nothing is listed that is not whole
        assert any("is unfinished" in note for note in found.notes)
    for folder in ("whole", "killed"):
        done = export(made, "geojson", tmp_path / folder, overwrite=again, **WINDOW)
        assert {each.error for each in done} == {""}
    assert told(tmp_path / "killed") == []
    one, other = ({name: (tmp_path / f / name).read_bytes() for name in files_in(tmp_path / f)} for f in MADE)
    assert one == other


MADE = ("whole", "killed")


def test_another_export_lists_what_a_killed_one_had_done(made: Path, tmp_path: Path) -> None:
    place, name, count = MOMENTS["between journal and listing"]
    command = [sys.executable, "-c", KILLED, str(made), str(tmp_path), "geojson", place, name, str(count)]
    subprocess.run(command, cwd=ROOT, check=False)
    assert EXPORTS not in files_in(tmp_path)
    export(made, "png", tmp_path, ["a.svs"], size=64, **WINDOW)
    assert told(tmp_path) == []
    assert len(listed(tmp_path)) == 5


def test_a_hostile_listing_or_journal_names_nothing_outside(made: Path, tmp_path: Path) -> None:
    from wsi_gradcam.results.seals import sealed_json

    dest = tmp_path / "dest"
    dest.mkdir()
    (tmp_path / "secret").write_text("s")
    names = ["../secret", "/etc/passwd", "a/../../secret", "", "a//b"]
    (dest / EXPORTS).write_bytes(sealed_json({"files": dict.fromkeys(names, "0" * 64)}))
    assert [problem.endswith("which is not the path of an export") for problem in told(dest)] == [True] * len(names)
    (dest / EXPORTS).unlink()
    lines = [{"process": {}}, {"begun": "../secret", "job": "x", "new": True}, {"done": 7}, {"files": [1]}, 3, []]
    lines += [{"done": ["../secret"], "job": "x", "files": {"../secret": "0"}}, {"done": [], "files": {"x": 7}}]
    journal = dest / f".export.{'0' * 32}.partial"
    journal.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"ended": True}]))
    export(made, "png", dest, ["a.svs"], size=64, **WINDOW)
    assert (tmp_path / "secret").read_text() == "s"
    assert len(listed(dest)) == 1
    assert told(dest) == []
