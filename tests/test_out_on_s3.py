"""OUT in an object store: the same bytes as on a disk, whatever the store, the network and the processes go through."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli_runs import SMALL_FLAGS, Run, calling, write_inputs
from tests.runs import SMALL, contents, objects, start, toy_spec
from tests.s3_proxy import Proxy, at_random
from tests.test_mil_runs import BAG, write_model
from wsi_gradcam.api import explain, validate
from wsi_gradcam.doctor.checks import check_folder
from wsi_gradcam.errors import StoreError
from wsi_gradcam.io import object_stores
from wsi_gradcam.io.local import LOCK
from wsi_gradcam.io.paths import S3Path, storage_path


def slow(value: int | None) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def expected(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected")
    explain(inputs / "slides", toy_spec("pooled_linear"), out, **SMALL)
    return {name: data for name, data in contents(out).items() if name != LOCK}


def differing(out: str, expected: dict[str, bytes]) -> list[str]:
    found = objects(out)
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


def test_a_run_leaves_the_same_bytes_and_asks_little(
    inputs: Path, expected: dict[str, bytes], s3_out: str, s3_proxy: Proxy
) -> None:
    done = explain(inputs / "slides", toy_spec("pooled_linear"), s3_out, **SMALL)
    assert [record.status for record in done.records] == ["ok", "ok"]
    assert isinstance(done.out, S3Path)
    assert str(done.out / "slides.csv") == f"{s3_out}/slides.csv"
    assert differing(s3_out, expected) == []
    # the claim and the status are written anew every few seconds
    lasting = [
        r for r in s3_proxy.passed.requests if not r[1].endswith(("claim.json", "status.json"))
    ]  # anew each while
    methods = Counter(method for method, _ in lasting)
    spans = sum("/manifest/spans/" in target for method, target in s3_proxy.passed.requests if method == "PUT")
    assert spans == 7
    # logits, cam, status, blur and the manifest's; the rest are templates, heatmaps and what lies beside them
    assert methods["PUT"] <= 5 * spans + 2 * 40
    assert methods["GET"] <= 25 * spans + 2 * 160  # of which finishing takes 22 for digests of what else there is
    assert validate(s3_out) == []
    s3_proxy.passed.requests.clear()
    again = explain(inputs / "slides", toy_spec("pooled_linear"), s3_out, **SMALL)
    assert all(record.skipped for record in again.records)
    assert not [target for method, target in s3_proxy.passed.requests if "cams.zarr" in target]
    assert differing(s3_out, expected) == []


@pytest.mark.parametrize("workers", [slow(None), slow(2)])
def test_a_store_that_fails_a_twentieth_of_its_requests(
    workers: int | None, inputs: Path, expected: dict[str, bytes], s3_out: str, s3_proxy: Proxy
) -> None:
    s3_proxy.passed.fails = at_random(0.05, 17)
    done = explain(inputs / "slides", toy_spec("pooled_linear"), s3_out, workers=workers, **SMALL)
    s3_proxy.passed.fails = lambda method, target: ""
    assert not done.failed
    assert s3_proxy.passed.failed > 15
    assert differing(s3_out, expected) == []
    assert validate(s3_out) == []


@pytest.fixture
def doomed(s3_proxy: Proxy, inputs: Path, s3_out: str) -> Iterator[Callable[[int], None]]:
    """Runs in a process that is killed when the store gets its n-th change, counted from 0, before that is made."""
    processes: list[Any] = []

    def run(change: int) -> None:
        left = change
        dead = threading.Event()

        def kill(method: str, target: str) -> str:
            nonlocal left
            if method == "GET" or dead.is_set():
                return ""
            if left == 0:
                dead.set()
                os.kill(processes[-1].pid, signal.SIGKILL)
                return "reset"
            left -= 1
            return ""

        s3_proxy.passed.fails = kill
        slides = sorted((inputs / "slides").iterdir())
        environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        processes.append(start(slides, "pooled_linear", s3_out, environment=environment))
        processes[-1].join(120)
        s3_proxy.passed.fails = lambda method, target: ""
        assert processes[-1].exitcode == -signal.SIGKILL

    yield run
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.parametrize("change", [slow(0), 12, slow(40), slow(60), slow(90)])
def test_a_killed_run_continues(
    change: int, doomed: Callable[[int], None], inputs: Path, expected: dict[str, bytes], s3_out: str, s3_proxy: Proxy
) -> None:
    doomed(change)
    before = {name for name in objects(s3_out) if "/manifest/spans/" in name}
    finished = {name.partition("/")[0] for name in objects(s3_out) if name.endswith("/done.json")}
    s3_proxy.passed.requests.clear()
    explain(inputs / "slides", toy_spec("pooled_linear"), s3_out, **SMALL)
    written = {target for method, target in s3_proxy.passed.requests if method == "PUT"}
    assert not {target for target in written if any(target.endswith(name) for name in before)}
    assert not {target for target in written if any(f"/{name}/" in target for name in finished)}
    assert differing(s3_out, expected) == []


@pytest.mark.parametrize("change", [slow(0), 70])
def test_a_store_that_goes_away_stops_the_run(
    change: int, inputs: Path, expected: dict[str, bytes], s3_out: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_stores, "OUT_PATIENCE_S", 1.0)
    monkeypatch.setattr(object_stores, "LONGEST_DELAY_S", 0.3)
    changes = iter(range(10**6))
    gone = threading.Event()

    def fails(method: str, target: str) -> str:
        if method != "GET" and next(changes) == change:
            gone.set()
        return "reset" if gone.is_set() else ""

    s3_proxy.passed.fails = fails
    with pytest.raises(StoreError, match=r"s3://.*the same command again: nothing finished is lost"):
        explain(inputs / "slides", toy_spec("pooled_linear"), s3_out, **SMALL)
    s3_proxy.passed.fails = lambda method, target: ""
    explain(inputs / "slides", toy_spec("pooled_linear"), s3_out, **SMALL)
    assert differing(s3_out, expected) == []


def test_a_slide_level_run_leaves_the_same_bytes(inputs: Path, tmp_path: Path, s3_out: str) -> None:
    model, slide = write_model(tmp_path / "model"), inputs / "slides/b.tif"
    explain(slide, model, tmp_path / "out", trust_code=True, **BAG)
    explain(slide, model, s3_out, trust_code=True, **BAG)
    wanted = {name: data for name, data in contents(tmp_path / "out").items() if name != LOCK}
    assert any("features.zarr" in name for name in wanted)
    assert differing(s3_out, wanted) == []
    assert validate(s3_out) == []


def test_validate_finds_what_was_changed(inputs: Path, s3_out: str) -> None:
    explain(inputs / "slides/a.tif", toy_spec("pooled_linear"), s3_out, **SMALL)
    out = storage_path(s3_out)
    for name, problem in {
        "overview.png": "overview.png differs from what was made",
        "cams.zarr/logits/c/0/0": "span 0 (patches 0 to 12) of cams.zarr differs from what was computed",
        "heatmap.ome.zarr/labels/zarr.json": "heatmap.ome.zarr is not valid OME-Zarr",
    }.items():
        kept = (out / "a.tif" / name).read()
        (out / "a.tif" / name).remove() if name.endswith("/0") else (out / "a.tif" / name).write(b"{}")
        assert any(finding.problem.startswith(problem) for finding in validate(s3_out)), name
        (out / "a.tif" / name).write(kept)
    assert validate(s3_out) == []
    (out / "a.tif/manifest/done.json").remove()
    (out / "slides.csv").remove()
    assert "a.tif" in {finding.slide for finding in validate(s3_out)}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Run:
    return calling(capsys)


def test_the_command_line_takes_a_url(inputs: Path, expected: dict[str, bytes], s3_out: str, call: Run) -> None:
    model = inputs / "pooled_linear.yaml"
    explaining = ("explain", inputs / "slides", "--model", model, "--out", s3_out, *SMALL_FLAGS)
    assert call(*explaining, "--dry-run")[0] == 0
    assert not storage_path(s3_out).exists()
    code, told, error = call(*explaining)
    assert (code, error.count("error")) == (0, 0), error
    assert f"results in {s3_out}" in told
    assert set(objects(s3_out)) == set(expected)
    assert call("validate", s3_out)[:2] == (0, f"{s3_out}: valid\n")
    code, _, error = call(
        "explain", inputs / "slides", "--model", inputs / "other_linear.yaml", "--out", s3_out, *SMALL_FLAGS
    )
    assert code == 2
    assert f"error: {s3_out}: holds results of another model" in error
    code, _, error = call("validate", f"{s3_out}/none")
    assert (code, f"{s3_out}/none: does not exist or is empty" in error) == (2, True)
    code, _, error = call(*explaining[: -len(SMALL_FLAGS) - 1], "https://host/out")
    assert (code, "https://host/out: expected a folder, or s3://BUCKET/KEY" in error) == (2, True)


def test_the_doctor_tries_a_bucket_and_leaves_nothing(s3_out: str, s3_proxy: Proxy) -> None:
    checks = list(check_folder(storage_path(s3_out)))
    assert [(check.name, check.status) for check in checks] == [("OUT: arrays", "ok"), ("OUT: claims", "ok")]
    assert not storage_path(s3_out).exists()
    s3_proxy.passed.fails = lambda method, target: "403" if method == "PUT" else ""
    (check,) = check_folder(storage_path(s3_out))
    assert check.status == "fail"
    assert "access was refused" in check.found
