"""One run at a time on an OUT: claims in a folder and in an object store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from tests.servers import BUCKET, CREDENTIALS, s3_server
from wsi_gradcam.errors import ResumeError, StoreError
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.io.paths import StoragePath, storage_path
from wsi_gradcam.run import claims
from wsi_gradcam.run.claims import CLAIM, Claim, Holder, new_run_id, read_holder
from wsi_gradcam.system.processes import this_process

FAR = replace(this_process(), host="node7", boot="another boot pid:[1]")
GONE = replace(this_process(), start="1")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(params=["disk", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoragePath:
    """A place for results in which nothing is."""
    if request.param == "disk":
        return storage_path(tmp_path)
    url = request.getfixturevalue("server")
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": url}.items():
        monkeypatch.setenv(name, value)
    return storage_path(f"s3://{BUCKET}/{tmp_path.name}")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HEARTBEAT_S": 0.05, "SILENT_S": 0.5, "POLL_S": 0.02}.items():
        monkeypatch.setattr(claims, name, value)


class Told(list[str]):
    """What a claim says."""

    def __call__(self, text: str) -> None:
        self.append(text)


def claim(out: StoragePath, name: str = "mine", say: Callable[[str], None] | None = None) -> Claim:
    return Claim(out, name, Told() if say is None else say)


def check_again_and_again(mine: Claim) -> None:
    """For ten seconds."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        mine.check()
        time.sleep(0.02)


def stand(out: StoragePath, **changes: object) -> Holder:
    """The claim of a run of which nothing else is left."""
    holder = replace(Holder("theirs", FAR, "2026-01-01T00:00:00Z", 5), **changes)  # type: ignore[arg-type]
    (out / CLAIM).write(holder.to_bytes())
    return holder


def test_a_claim_is_there_and_renewed_and_goes_away(out: StoragePath) -> None:
    with claim(out) as mine:
        first = read_holder(out)
        assert first is not None
        assert (first.run_id, first.process, first.beat) == ("mine", this_process(), 0)
        until = time.monotonic() + 10
        while (now := read_holder(out)) is None or now.beat < 3:
            assert time.monotonic() < until, "it is not renewed"
            time.sleep(0.02)
        assert replace(now, beat=0) == first
        mine.check()
    assert read_holder(out) is None


def test_a_second_run_is_refused_with_all_that_helps(out: StoragePath) -> None:
    with claim(out, "first"):
        for attempt in (claim(out).__enter__, claim(out).look_first):
            with pytest.raises(ResumeError) as caught:
                attempt()
            text = str(caught.value)
            for part in (
                str(out),
                "run first",
                this_process().host,
                f"process {this_process().pid}",
                "since 20",
                "--out",
            ):
                assert part in text
            assert f"`wsi-gradcam status {out}`" in text
        holder = read_holder(out)
        assert holder is not None
        assert holder.run_id == "first"
    with claim(out):
        pass


def test_of_many_that_come_at_once_one_is_let_in(out: StoragePath) -> None:
    stand(out, process=GONE)
    barrier, entered, refused = threading.Barrier(6), [], []

    def come(number: int) -> None:
        with ExitStack() as stack:
            barrier.wait()
            try:
                mine = stack.enter_context(claim(out, f"run {number}"))
            except ResumeError:
                refused.append(number)
            else:
                entered.append(number)
                time.sleep(1)
                mine.check()

    threads = [threading.Thread(target=come, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(entered), len(refused)) == (1, 5)


def test_a_killed_run_of_this_machine_is_followed_at_once(out: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "SILENT_S", 3600.0)
    stand(out, process=GONE)
    with claim(out, say=(told := Told())) as mine:
        mine.check()
    (line,) = told
    assert "run theirs" in line
    assert line.endswith("ended without finishing; continuing with what it finished")


def test_a_run_that_ended_while_the_store_was_away_is_followed_by_the_next_of_its_process(
    out: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: StoragePath) -> None:
        raise StoreError("away")

    with monkeypatch.context() as patch, claim(out, "first", say=(told := Told())):
        patch.setattr(type(out), "remove", away)
    assert told == [f"the claim on {out} could not be removed: away"]
    assert read_holder(out) is not None
    with claim(out, "second") as mine:
        mine.check()


def test_a_silent_run_elsewhere_is_waited_for_and_then_replaced(out: StoragePath) -> None:
    stand(out)
    started = time.monotonic()
    with claim(out, say=(told := Told())):
        assert time.monotonic() - started >= claims.SILENT_S
        holder = read_holder(out)
        assert holder is not None
        assert holder.run_id == "mine"
    waiting, taking = told
    assert "waiting up to" in waiting
    assert "node7" in taking
    assert taking.endswith("taking over")


def test_looking_first_waits_once(out: StoragePath) -> None:
    stand(out)
    mine = claim(out, say=(told := Told()))
    mine.look_first()
    assert "theirs" in (out / CLAIM).read().decode()
    started = time.monotonic()
    with mine:
        assert time.monotonic() - started < claims.SILENT_S
    assert len(told) == 2


def test_a_run_elsewhere_that_gives_a_sign_of_life_is_left_alone(
    out: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "SILENT_S", 3600.0)
    theirs = stand(out)
    timer = threading.Timer(0.3, lambda: (out / CLAIM).write(replace(theirs, beat=6).to_bytes()))
    timer.start()
    with pytest.raises(ResumeError, match="run theirs on node7"):
        claim(out).__enter__()
    timer.join()


def test_a_run_elsewhere_that_ends_meanwhile_makes_room(out: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "SILENT_S", 3600.0)
    stand(out)
    timer = threading.Timer(0.3, (out / CLAIM).remove)
    timer.start()
    with claim(out) as mine:
        mine.check()
    timer.join()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"process": {}}', b'{"run_id": 1}'])
def test_what_is_no_claim_is_replaced_after_a_while(out: StoragePath, text: bytes) -> None:
    (out / CLAIM).write(text)
    assert read_holder(out) is None
    with claim(out, say=(told := Told())) as mine:
        mine.check()
    assert "an unknown run" in told[-1]


def test_a_run_finds_out_that_it_has_lost_its_claim(out: StoragePath) -> None:
    with claim(out) as mine:
        theirs = stand(out)
        with pytest.raises(ResumeError, match=r"taken over by run theirs on node7 .*; this run stops"):
            check_again_and_again(mine)
    assert read_holder(out) == theirs  # not removed with the one that lost it


def test_a_claim_that_vanishes_is_made_again(out: StoragePath) -> None:
    with claim(out) as mine:
        (out / CLAIM).remove()
        until = time.monotonic() + 10
        while read_holder(out) is None:
            assert time.monotonic() < until, "it is not made again"
            time.sleep(0.02)
        mine.check()
    assert read_holder(out) is None


def test_a_store_that_fails_for_a_while_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = LocalPath(tmp_path)
    failures = iter([True] * 5)
    real = LocalPath.replace

    def flaky(place: LocalPath, data: bytes, known: str) -> bool:
        if next(failures, False):
            raise StoreError("the store is away")
        return real(place, data, known)

    monkeypatch.setattr(LocalPath, "replace", flaky)
    with claim(out) as mine:
        until = time.monotonic() + 10
        while (holder := read_holder(out)) is None or holder.beat < 8:
            assert time.monotonic() < until
            time.sleep(0.02)
        mine.check()


def test_a_claim_that_cannot_be_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: LocalPath) -> None:
        raise StoreError("no")

    with claim(LocalPath(tmp_path), say=(told := Told())):
        monkeypatch.setattr(LocalPath, "remove", refuse)
    assert told == [f"the claim on {tmp_path} could not be removed: no"]


def test_names_of_runs_sort_by_time_and_differ() -> None:
    names = [new_run_id() for _ in range(50)]
    assert len(set(names)) == 50
    assert [name[:16] for name in names] == sorted(name[:16] for name in names)
