"""Runs that stand still, whose clock jumps, whose slide is replaced, and whose OUT is named in several ways."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.runs import SMALL, differing, rows_of, start, toy_spec
from tests.servers import BUCKET, CREDENTIALS, s3_server
from tests.synthetic import write_marker_slide
from wsi_gradcam.api import explain, validate
from wsi_gradcam.errors import ResumeError
from wsi_gradcam.io.paths import storage_path
from wsi_gradcam.results.overview import draw_overview
from wsi_gradcam.run import claims, stages, status, stitching
from wsi_gradcam.run.claims import CLAIM, Claim
from wsi_gradcam.run.status import RunState, observe
from wsi_gradcam.system import processes
from wsi_gradcam.system.processes import this_process

pytestmark = pytest.mark.disk


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one slide, and beside it another of the same size."""
    folder = tmp_path_factory.mktemp("slides")
    (folder / "archive").mkdir()
    for name, seed in (("archive/a.tif", 1), ("other.tif", 2)):
        write_marker_slide(folder / name, 390, 500, mpp=0.25, markers=[(60, 60)], marker_px=16, seed=seed)
    return folder


@pytest.fixture(scope="module")
def undisturbed(slides: Path) -> Path:
    out = slides / "undisturbed"
    explain(slides / "archive", toy_spec("pooled_linear"), out, **SMALL)
    return out


@pytest.fixture
def archive(slides: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(slides / "archive", tmp_path / "archive"))


def replaced(slide: Path, other: Path) -> None:
    """By renaming, as programs that copy do."""
    shutil.copy(other, slide.with_name("new"))
    slide.with_name("new").replace(slide)


def overwritten(slide: Path, other: Path) -> None:
    """In place, into the file that is open."""
    slide.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    ("change", "moment", "reader"),
    [
        (replaced, (stages, "_explain"), "auto"),
        (overwritten, (stitching, "_complete_block"), "auto"),
        (replaced, (stitching, "draw_overview"), "openslide"),
        (overwritten, (stages, "_explain"), "openslide"),
    ],
)
def test_a_slide_that_is_replaced_fails_and_is_never_mixed(
    slides: Path,
    archive: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, Path], None],
    moment: tuple[Any, str],
    reader: str,
) -> None:
    out, left = tmp_path / "out", [1]

    def once() -> None:
        if left:
            left.pop()
            change(archive / "a.tif", slides / "other.tif")

    with monkeypatch.context() as patch:
        patch.setattr(*moment, wrapped(getattr(*moment), once))
        done = explain(archive, toy_spec("pooled_linear"), out, reader=reader, **SMALL)
    assert left == []
    assert [record.slide.id for record in done.failed] == ["a.tif"]
    error = rows_of(out)["a.tif"]["error"]
    unreadable = change is overwritten and "cannot be decoded" in error
    assert unreadable or "was replaced by another file during the run" in error
    assert not (out / "a.tif/manifest/done.json").exists()
    again = explain(archive, toy_spec("pooled_linear"), out, reader=reader, retry_failed=True, **SMALL)
    assert "holds results of a different file" in again.records[0].error
    anew = explain(archive, toy_spec("pooled_linear"), out, reader=reader, overwrite=True, **SMALL)
    assert anew.failed == ()
    assert validate(out) == []


def wrapped(function: Callable[..., Any], before: Callable[[], None]) -> Callable[..., Any]:
    def called(*given: Any, **named: Any) -> Any:
        before()
        return function(*given, **named)

    return called


def test_a_slide_that_was_only_touched_is_no_other(
    archive: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stitching, "draw_overview", wrapped(draw_overview, (archive / "a.tif").touch))
    done = explain(archive, toy_spec("pooled_linear"), tmp_path / "out", **SMALL)
    assert done.failed == ()


def test_a_run_that_stands_still_keeps_its_claim(
    slides: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is stopped is there: nobody takes its place, however long it says nothing."""
    monkeypatch.setattr(claims, "SILENT_S", 0.5)
    monkeypatch.setattr(status, "PATIENCE_S", 0.5)
    out = tmp_path / "out"
    process = start([slides / "archive/a.tif"], "slow_linear", out, slowness_s=0.3)
    try:
        until = time.monotonic() + 60
        while not list(out.glob("a.tif/manifest/spans/*.json")) and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(1.2)
        with pytest.raises(ResumeError, match=rf"\(process {process.pid}\).* is at work there"):
            explain(slides / "archive", toy_spec("slow_linear"), out, **SMALL)
        assert [seen.state for seen in observe(out)] == [RunState.RUNNING]
        os.kill(process.pid, signal.SIGCONT)
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
    assert not (out / CLAIM).exists()
    assert validate(out) == []
    assert [row["status"] for row in rows_of(out).values()] == ["ok"]


class JumpingClock:
    """A clock that is a day ahead, then a day behind, each time that it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def now(self, zone: Any = None) -> datetime:
        self.asked += 1
        return datetime.now(zone) + timedelta(days=(-1) ** self.asked)


def test_a_clock_that_jumps_changes_nothing(
    slides: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = JumpingClock()
    monkeypatch.setattr(claims, "datetime", clock)
    monkeypatch.setattr(status, "datetime", clock)
    monkeypatch.setattr("wsi_gradcam.run.report.datetime", clock)
    steps = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: 1e9 + 1e6 * (-1) ** next(steps))
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.02)
    out = tmp_path / "out"
    explain(slides / "archive", toy_spec("pooled_linear"), out, **SMALL)
    assert clock.asked > 4
    assert differing(out, undisturbed) == []
    (seen,) = observe(out)
    assert (seen.state, seen.is_well) == (RunState.FINISHED, True)
    assert seen.status is not None
    assert 0 <= seen.status.numbers.elapsed_s < 600
    assert not (out / CLAIM).exists()


def test_a_process_is_the_same_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The time of the boot, which is reckoned from the clock, is not asked."""
    before = this_process()
    monkeypatch.setattr("psutil.boot_time", lambda: datetime.now(UTC).timestamp() + 86_400)
    assert this_process() == before
    assert before.alive() is True
    source = Path(processes.__file__).read_text()
    assert "create_time" not in source


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.mark.parametrize("way", ["link", "relative", "..", "link in a link", "slash"])
def test_one_run_at_a_time_however_out_is_named(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "folder").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {
        "link": "link",
        "relative": "./out",
        "..": "folder/../" + tmp_path.name + "/out",
        "link in a link": "folder/link",
        "slash": f"{out}/",
    }
    other = names[way]
    assert Path(other).samefile(out)
    with (
        Claim(storage_path(out), "another", print),
        pytest.raises(ResumeError, match=r"run another on .* is at work there"),
    ):
        explain(slides / "archive", toy_spec("pooled_linear"), other, **SMALL)
    assert sorted(path.name for path in out.iterdir()) == []


@pytest.mark.parametrize("name", ["{}/", "{}//", "S3{}"])
def test_one_run_at_a_time_however_a_bucket_is_named(
    slides: Path, server: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for key, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(key, value)
    out = f"s3://{BUCKET}/named/out"
    other = name.format(out) if name.startswith("{") else name.format(out[2:])
    with (
        Claim(storage_path(out), "another", print),
        pytest.raises(ResumeError, match=r"run another on .* is at work there"),
    ):
        explain(slides / "archive", toy_spec("pooled_linear"), other, **SMALL)
