"""Slides that are read by processes of their own: the same pixels and errors, and no more than a slide is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from tests import bombs, isolated_toys
from tests.conftest import SHARED_DATA
from tests.made_results import Made, make, steps
from tests.runs import ROOT, SMALL, differing, toy_spec
from tests.servers import web_server
from tests.synthetic import corrupt_tile, truncate, write_marker_slide
from wsi_gradcam.api import explain
from wsi_gradcam.cli.main import main
from wsi_gradcam.errors import (
    ConfigError,
    SlideAccessError,
    SlideError,
    SlideFormatError,
    SlideMemoryError,
    SlideReadError,
)
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.urls import allowing_for_run
from wsi_gradcam.slides import (
    Limits,
    isolated_process,
    isolated_reader,
    open_slide,
    read_region,
    thumbnail,
    with_reductions,
)
from wsi_gradcam.system.confinement import CALLS, ISOLATE, Link, filter_of, isolating, limits_here, linked
from wsi_gradcam.viewer import app

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are confined on Linux only")
REAL = [
    "aperio/CMU-1-Small-Region.svs",
    "tiff/image-tiff-planar-rgb-u8.tif",
    "tiff/image-tiff-tiled-rgb-u8.tif",
]
PART = Region(3, 5, 40, 50)


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slide")
    return write_marker_slide(folder / "a.tif", 700, 900, mpp=0.25, markers=[(100, 200)], marker_px=16).path


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder for slides of `isolated_toys`, which this process's server reads."""
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    monkeypatch.setenv("WSI_GRADCAM_TEST_VICTIM", str(victim))
    monkeypatch.setenv("WSI_GRADCAM_TEST_PARENT", str(os.getpid()))
    servers = isolated_reader._SERVERS
    monkeypatch.setattr(isolated_reader, "_SERVERS", [])
    monkeypatch.setattr(isolated_reader, "isolated_process", isolated_toys)
    monkeypatch.setattr(isolated_reader, "serve_slide", isolated_toys.serve)
    yield tmp_path
    for server in isolated_reader._SERVERS:
        server.close()
    assert isolated_reader._SERVERS is not servers


def toy(folder: Path, **acts: Any) -> Path:
    path = folder / "toy.tif"
    path.write_text(json.dumps(acts))
    return path


def same(pictures: Iterable[NDArray[np.uint8]]) -> bool:
    one, other = pictures
    return np.array_equal(one, other)


def same_pixels(path: Path | str, mpp: float | None = None) -> None:
    with_limits = Limits(1024, 60)
    here, there = open_slide(path, mpp), open_slide(path, mpp, isolate=with_limits)
    try:
        assert there.info == here.info
        for slides in ((here, there), (with_reductions(here), with_reductions(there))):
            assert slides[1].info == slides[0].info
            for level in range(len(slides[0].info.levels)):
                for region in (PART, Region(-7, -9, 30, 40)):
                    assert same(slide.read_level(level, region) for slide in slides)
            own = here.info.mpp_yx[0]
            assert same(read_region(slide, 11.5, 3, 60, 70, 1.7 * own) for slide in slides)
            assert same(thumbnail(slide, 0.0, 200).rgb for slide in slides)
    finally:
        here.close()
        there.close()


@pytest.mark.parametrize("name", REAL)
def test_real_slides_have_the_same_metadata_and_pixels(name: str) -> None:
    path = SHARED_DATA / "slides" / name
    if not path.exists():
        pytest.skip("the shared data are not there")
    same_pixels(path, 0.5)


def test_a_made_slide_has_the_same_metadata_and_pixels(slide_path: Path) -> None:
    same_pixels(slide_path)


def test_a_remote_slide_has_the_same_metadata_and_pixels(slide_path: Path) -> None:
    with web_server(slide_path.parent) as server:
        same_pixels(f"{server.url}/a.tif")
        with allowing_for_run(("elsewhere",)), pytest.raises(SlideAccessError, match="not one of the allowed hosts"):
            open_slide(f"{server.url}/a.tif", isolate=True)


def test_many_threads_read_the_same(slide_path: Path) -> None:
    places = [Region(y, x, 64, 64) for y in range(0, 640, 64) for x in range(0, 832, 64)]
    here, there = open_slide(slide_path), open_slide(slide_path, isolate=True)
    with ThreadPoolExecutor(8) as pool:
        found = [list(pool.map(lambda at, slide=slide: slide.read_level(0, at), places)) for slide in (here, there)]
    there.close()
    here.close()
    assert all(map(np.array_equal, *found))


def failing(path: Path, isolate: bool) -> list[tuple[str, str]]:
    """The errors of opening and reading, with their causes."""
    error: BaseException | None = None
    try:
        slide = open_slide(path, isolate=isolate)
        try:
            slide.read_level(0, Region(0, 0, slide.info.height, slide.info.width))
        finally:
            slide.close()
    except SlideError as found:
        error = found
    told = []
    while error is not None:
        told.append((type(error).__name__, str(error)))
        error = error.__cause__
    return told


@pytest.mark.parametrize("damage", ["cut", "tile", "text", "empty", "missing", "vsi"])
def test_errors_are_the_same(slide_path: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "bad.tif"
    if damage == "cut":
        truncate(slide_path, path, 0.4)
    elif damage == "tile":
        corrupt_tile(slide_path, path, 0, 0, 1)
    elif damage == "vsi":
        path = path.with_suffix(".vsi")
        path.touch()
    elif damage != "missing":
        path.write_bytes(b"" if damage == "empty" else b"no slide")
    here, there = failing(path, False), failing(path, True)
    assert here[0] == there[0]
    assert here[0][1].startswith(str(path))
    ours = [each for each in here if each[0].startswith("Slide")]
    assert there[: len(ours)] == ours


def test_all_that_is_forbidden_fails(toys: Path) -> None:
    slide = open_slide(toy(toys, read="try_all"), isolate=True)
    with pytest.raises(SlideReadError) as error:
        slide.read_level(0, PART)
    slide.close()
    assert str(error.value) == "done: "
    assert (toys / "victim").read_text() == "as it was"


def test_a_url_alone_has_a_network(toys: Path) -> None:
    """In the filter that a process for a URL gets, the call that opens sockets is missing, and nothing else."""
    for calls in CALLS.values():
        closed, opened = (filter_of(calls, network) for network in (False, True))
        assert len(closed) == len(opened) + 16
    with pytest.raises(SlideReadError, match="PermissionError"):
        read_once(toy(toys, read="connect"))


def read_once(path: Path, limits: Limits | bool = True) -> None:
    slide = open_slide(path, isolate=limits)
    try:
        slide.read_level(0, PART)
    except OSError as error:
        if isinstance(error, SlideError):
            raise
        raise SlideReadError(repr(error)) from error
    finally:
        slide.close()


def test_memory_costs_the_region(toys: Path) -> None:
    before = psutil.Process().memory_info().rss
    slide = open_slide(toy(toys, read="eat", at=3), isolate=Limits(64))
    with pytest.raises(SlideReadError, match=r"needed more than 64 MiB of memory while reading.*--isolate-memory"):
        slide.read_level(0, PART)
    assert slide.read_level(0, Region(9, 0, 2, 2)).max() == 9
    slide.close()
    with pytest.raises(SlideFormatError, match=r"needed more than 64 MiB of memory while opening it"):
        open_slide(toy(toys, open="eat"), isolate=Limits(64))
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_time_costs_the_slide(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated_reader, "MOST_DEATHS", 2)
    with pytest.raises(SlideFormatError, match=r"took more than 0\.2 s while opening it.*--isolate-seconds"):
        open_slide(toy(toys, open="spin"), isolate=Limits(64, 0.2))
    slide = open_slide(toy(toys, read="spin", at=3), isolate=Limits(64, 0.2))
    assert slide.read_level(0, Region(9, 0, 2, 2)).max() == 9
    with pytest.raises(SlideError, match=r"took more than 0\.2 s while reading level 0.*after 2 processes"):
        slide.read_level(0, PART)
    with pytest.raises(SlideError, match="took more than"):  # at once
        slide.read_level(0, Region(9, 0, 2, 2))
    slide.close()


@pytest.mark.parametrize(
    ("act", "words", "kind"), [("crash", "SIGSEGV", SlideError), ("be_killed", "SIGKILL", SlideMemoryError)]
)
def test_a_crash_costs_the_slide(toys: Path, act: str, words: str, kind: type[SlideError]) -> None:
    with pytest.raises(SlideError, match=f"{words} ended the process that read it, while opening it"):
        open_slide(toy(toys, open=act), isolate=True)
    slide = open_slide(toy(toys, read=act, at=3), isolate=True)
    assert slide.read_level(0, Region(9, 0, 2, 2)).max() == 9
    with pytest.raises(kind, match=rf"toy\.tif: {words} ended the process that read it, while reading.*3 processes"):
        slide.read_level(0, PART)
    slide.close()


def test_a_process_that_is_killed_is_replaced(toys: Path) -> None:
    """And a file that was replaced meanwhile is not read in its place."""
    path = toy(toys, digest="one")
    slide = open_slide(path, isolate=True)
    for killed in range(2):
        assert slide.read_level(0, Region(killed, 0, 2, 2)).max() == killed
        os.kill(process_of(slide), signal.SIGKILL)
    assert slide.read_level(0, Region(7, 0, 2, 2)).max() == 7
    slide.close()
    slide = open_slide(path, isolate=True)
    toy(toys, digest="two")
    os.kill(process_of(slide), signal.SIGKILL)
    with pytest.raises(SlideFormatError, match="has been replaced by another file"):
        slide.read_level(0, PART)
    slide.close()


def process_of(slide: Any) -> int:
    return int(slide._source._process._confined.pid)


def test_nothing_is_left(toys: Path) -> None:
    """Neither processes nor files: those that are killed, closed, or never opened."""
    before = len([*Path("/proc/self/fd").iterdir()])
    for _ in range(3):
        slide = open_slide(toy(toys), isolate=True)
        slide.read_level(0, PART)
        os.kill(process_of(slide), signal.SIGKILL)
        slide.read_level(0, PART)
        slide.close()
        with suppress(SlideError):
            open_slide(toy(toys, open="crash"), isolate=True)
    (server,) = isolated_reader._SERVERS
    assert psutil.Process(server._process.pid).children() == []
    server.close()
    assert server._process.returncode == 0
    assert len([*Path("/proc/self/fd").iterdir()]) <= before
    slide = open_slide(toy(toys), isolate=True)  # by another server
    isolated_reader._SERVERS[0]._process.kill()
    assert slide.read_level(0, Region(7, 0, 2, 2)).max() == 7  # by yet another
    slide.close()


def test_processes_end_with_the_one_that_asked(slide_path: Path, tmp_path: Path) -> None:
    script = (
        "import time; from wsi_gradcam.slides import open_slide\n"
        f"slide = open_slide({str(slide_path)!r}, isolate=True)\n"
        "print(slide._source._process._confined.pid, slide._source._process._server._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        pids = [int(pid) for pid in asking.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(psutil.pid_exists, pids))
        asking.kill()
    until = time.monotonic() + 10
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(psutil.pid_exists, pids))


def test_a_run_is_the_same_and_goes_on_either_way(slide_path: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "reader_threads": 2}
    for isolate, name in ((False, "here"), (True, "there")):
        explain(slide_path, toy_spec("pooled_linear"), tmp_path / name, isolate=isolate, **settings)
    assert differing(tmp_path / "there", tmp_path / "here") == ["run.yaml"]  # which has all settings
    for isolate, name in ((True, "here"), (False, "there")):
        again = explain(slide_path, toy_spec("pooled_linear"), tmp_path / name, isolate=isolate, **settings)
        assert [record.skipped for record in again.records] == [True]


def test_a_bomb_costs_its_slide_and_not_the_run(slide_path: Path, toys: Path) -> None:
    slides = [toy(toys, read="eat"), toys / "crash.tif", toys / "whole.tif"]
    slides[1].write_text(json.dumps({"open": "crash"}))
    slides[2].write_text(json.dumps({}))
    settings = {**SMALL, "patch_px": 32, "isolate_memory": 64}
    done = explain([*map(str, slides)], toy_spec("pooled_linear"), toys / "out", isolate=True, **settings)
    told = {record.slide.id: record.error for record in done.records}
    assert told["whole.tif"] == ""
    assert "needed more than 64 MiB of memory" in told["toy.tif"]
    assert "SIGSEGV ended the process that read it" in told["crash.tif"]


@pytest.mark.parametrize("kind", ["tiff", "zarr"])
def test_bombs_are_refused_or_read_within_small_limits(kind: str, tmp_path: Path) -> None:
    """As this process does it, or for want of memory; some of each kind."""
    makers = [maker for name, maker in bombs.all_bombs().items() if name.startswith(kind)]
    said = []
    for number, maker in enumerate(makers[1::6]):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = maker(folder, np.random.default_rng(number))
        try:
            slide = open_slide(path, 0.5, isolate=Limits(400, 10))
            with suppress(SlideReadError):
                slide.read_level(0, PART)
            slide.close()
        except SlideError as error:
            said.append((str(path), str(error)))
    assert said
    assert [text for path, text in said if path not in text or "took more than" in text] == []


def test_settings_come_from_flags_and_the_environment(
    slide_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ISOLATE, "100,5")
    assert limits_here() == Limits(100, 5)
    with isolating(Limits(7, 8)):
        assert limits_here() == Limits(7, 8)
    assert limits_here() == Limits(100, 5)
    monkeypatch.setenv(ISOLATE, "much")
    with pytest.raises(ConfigError, match="WSI_GRADCAM_ISOLATE is 'much', expected MiB and seconds"):
        open_slide(slide_path)
    assert main(["info", str(slide_path), "--isolate", "--isolate-memory", "1"]) == 2
    assert "needed more than 1 MiB" in capsys.readouterr().err
    monkeypatch.delenv(ISOLATE)
    assert main(["info", str(slide_path), "--isolate"]) == 0
    with pytest.raises(ConfigError):
        Limits(0)


def test_other_systems_say_that_they_have_no_such_processes(slide_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsi_gradcam.system.confinement.can_confine", lambda: False)
    with pytest.raises(ConfigError, match="only on Linux; omit --isolate"):
        open_slide(slide_path, isolate=True)
    open_slide(slide_path).close()


def test_what_a_process_tells_is_not_trusted() -> None:
    """Sizes beyond all bounds, classes of errors that are none of ours, and words that are no message."""
    slide = {"path": "a", "mpp": None, "mpp_problem": "", "vendor": "", "background": [0, 0, 0], "bounds": None}
    level = {"height": 1 << 40, "width": 1, "downsample_y": 1, "downsample_x": 1, "problem": "", "shift": 0}
    more: dict[str, Any] = {"digest": "", "objective": None, "images": []}
    wrong: list[Any] = [[level], [{}], "x", None, []]
    for levels in wrong:
        with pytest.raises(SlideFormatError, match=r"impossible sizes|invalid reply"):
            isolated_process.info_of({**slide, **more, "levels": levels})
    for name in ("SystemExit", "StopIteration", "Iterable", "eval", "__import__"):
        assert type(isolated_process.error_of([[name, ["x"]]])) is RuntimeError
    ours, theirs = linked()
    with theirs:
        theirs.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(EOFError):
            ours.receive()
        theirs.sendall(b"\0\0\0\2[]")
        with pytest.raises(EOFError):
            ours.receive()
    ours.close()


def test_a_wait_in_which_nothing_works_does_not_count(toys: Path) -> None:
    """Where all stand still for a while, as at SIGSTOP, no slide is given up for it."""
    slide = open_slide(toy(toys), isolate=Limits(64, 0.2))
    server = psutil.Process(process_of(slide))
    server.suspend()
    timer = threading.Timer(0.6, server.resume)
    timer.start()
    started = time.monotonic()
    assert slide.read_level(0, Region(5, 0, 2, 2)).max() == 5
    assert time.monotonic() - started > 0.5
    slide.close()
    timer.join()


def test_links_pass_messages_of_any_length() -> None:
    ours, theirs = linked()
    other = Link(theirs)
    text = "x" * 300_000
    sender = threading.Thread(target=ours.send, args=({"text": text},))
    sender.start()
    assert other.receive() == ({"text": text}, [])
    sender.join()
    with socket.socket() as given:
        ours.send({"n": np.int64(3)}, [given.fileno()])
    message, descriptors = other.receive()
    assert message == {"n": 3}
    for descriptor in descriptors:
        os.close(descriptor)
    ours.close()
    with pytest.raises(EOFError):
        other.receive()
    other.close()


def test_the_viewer_isolates_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Limits | None] = []

    class Server:
        def run(self, sockets: Any) -> None:
            seen.append(limits_here())

    monkeypatch.setattr(app, "make_server", lambda *given: Server())
    monkeypatch.setattr(app, "make_app", lambda *given: None)
    out = make(tmp_path / "out", {"a.svs": Made((300, 300), steps((19, 19)))})
    for isolate in (None, True, False):
        app.view(str(out), port=0, isolate=isolate, announce=lambda text: None)
    assert seen == [Limits(), Limits(), None]
    assert limits_here() is None
