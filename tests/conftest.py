"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests import mirror
from tests.s3_proxy import Proxy, passing
from tests.servers import BUCKET, CREDENTIALS, s3_server
from wsi_gradcam.models.spec import ModelSpec
from wsi_gradcam.system.processes import make_sums_deterministic

# A busy machine is no failure; and CI shall not find a new example in an unrelated change.
settings.register_profile("project", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("project")

# A shell lets what it starts in the background ignore Ctrl-C, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything uses torch: runs in this process are compared with runs in fresh ones, bit by bit.
make_sums_deterministic()

# Networks of the tests are the tests' own code, which may run; `asking` is for tests of the permission itself.
# Processes that tests begin know nothing of this, and are given `--trust-code`.
TRUSTED: Any = ModelSpec.__private_attributes__["_trusted"]
TRUSTED.default = True

# What `auto` chooses is kept between runs: not in the user's folder, and from one test session to the next not at all.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="wsi-gradcam-tests-")

if os.environ.get(mirror.VARIABLE) == "s3":
    mirror.install()

# Processes of pytest-xdist share the cores: threads that wait for each other's cores take ten times as long.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With all results in an object store, leave out what a disk alone has."""
    if os.environ.get(mirror.VARIABLE) == "s3":
        for item in items:
            if item.get_closest_marker("disk"):
                item.add_marker(pytest.mark.skip(reason="of files on a disk"))


SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code in models needs permission, as outside of tests."""
    monkeypatch.setattr(TRUSTED, "default", False)


@pytest.fixture(scope="session")
def s3_upstream() -> Iterator[str]:
    """The URL of an S3 server with one empty bucket, for all tests of this process."""
    with s3_server() as url:
        yield url


@pytest.fixture(scope="session", autouse=os.environ.get(mirror.VARIABLE) == "s3")
def out_in_the_store(s3_upstream: str) -> Iterator[None]:
    """With `WSI_GRADCAM_TEST_OUT=s3` every test and every fixture has a store."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": s3_upstream}.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def s3_proxy(s3_upstream: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What stands before that server, and is where the environment says the store is."""
    with passing(s3_upstream) as proxy:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": proxy.url}.items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def s3_out(s3_proxy: Proxy, tmp_path: Path) -> str:
    """The URL of a folder of its own for each test."""
    return f"s3://{BUCKET}/{tmp_path.parent.name}/{tmp_path.name}"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real slides and tiles beside the project; see its README.md."""
    if not SHARED_DATA.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"{SHARED_DATA} is missing; CI needs the real data")
        pytest.skip(f"{SHARED_DATA} is missing; it holds real slides and is no part of the project")
    return SHARED_DATA
