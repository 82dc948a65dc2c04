"""The image, built by buildah on a base that debootstrap makes, and used as its own user: demo, view, health, compiler.

Nothing comes from a registry of images: the base is Debian's Python 3.11, which stands for python:3.11-slim. Packages
come from where pip, npm and apt of this machine have them. The image for CPUs needs an index of wheels of torch and
torchvision for CPUs, whose address TORCH_CPU_INDEX gives, and TORCH_CPU_PINS ("torch==... torchvision==...") where it
has other versions than constraints.txt; without an index that half is skipped.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import wsi_gradcam
from tests.runs import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
TOOLS = ("buildah", "debootstrap")
PATH = f"{os.environ['PATH']}:/usr/sbin"
SUITE, PACKAGES = "bookworm", "python3,python3-venv,python3-dev,ca-certificates"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PORT, USER, OTHER = 8765, 1000, 4321
SPACE_GB = {"gpu": 40, "cpu": 15}  # buildah copies what it commits several times
SITE = "/opt/wsi-gradcam/lib/python3.11/site-packages"
# As Triton does for each kernel: a module of Python in C, compiled while the program runs.
EXTENSION = """
import pathlib, subprocess, sysconfig, tempfile
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "a.c").write_text("#include <Python.h>\\nint main(void) { return Py_IsInitialized(); }")
headers = sysconfig.get_paths()["include"]
subprocess.run(["gcc", "-shared", "-fPIC", "-I", headers, "-o", folder / "a.so", folder / "a.c"], check=True)
"""


def say(*command: str | Path, **options: Any) -> str:
    """What a command prints; its last words where it fails."""
    done = subprocess.run([*map(str, command)], text=True, capture_output=True, check=False, **options)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return str(done.stdout)


class Store:
    """Images and containers in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tmp").mkdir(parents=True)
        self._places = ["--root", str(folder / "storage"), "--runroot", str(folder / "run"), "--storage-driver"]
        self.driver = "overlay" if self._has_overlay() else "vfs"  # which copies all files for each layer

    def _has_overlay(self) -> bool:
        command = ["buildah", *self._places, "overlay", "info"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def command(self, *arguments: str | Path) -> list[str]:
        return ["buildah", *self._places, self.driver, *map(str, arguments)]

    def buildah(self, *arguments: str | Path) -> str:
        return say(*self.command(*arguments), env=os.environ | {"TMPDIR": str(self.folder / "tmp")}).strip()

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder / "base/proc")], capture_output=True, check=False)
        for command in (("rm", "--all"), ("rmi", "--all", "--force")):
            subprocess.run(self.command(*command), capture_output=True, check=False)
        subprocess.run(["umount", "--lazy", str(self.folder / "storage/overlay")], capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def pip_settings() -> tuple[str, list[Path]]:
    """What pip of this machine is told, as a file of settings, and the folders that it names."""
    found = {}
    for line in say(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        found[re.split(r"[.]", name, maxsplit=1)[1]] = value.strip("'")
    folders = []
    for name, value in found.items():
        for part in value.split():
            path = Path(part.removeprefix("file://"))
            if path.is_absolute() and path.exists() and name != "cert":  # an index has its files beside it
                folders.append(path if name == "find-links" else path.parent)
    return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in found.items()), sorted(set(folders))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    missing = [name for name in TOOLS if not shutil.which(name, path=PATH)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root, and: apt-get install {' '.join(TOOLS)}")
    found = Store(tmp_path_factory.mktemp("images") / "store")
    yield found
    found.close()


@pytest.fixture(scope="module")
def base(store: Store) -> str:
    """Debian with Python 3.11, as Docker's python:3.11-slim is, and with this machine's certificates and settings."""
    root = store.folder / "base"
    say("debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, root, env=os.environ | {"PATH": PATH})
    shutil.rmtree(root / "var/cache/apt/archives")
    shutil.copy(CERTIFICATES, root / str(CERTIFICATES).lstrip("/"))
    (root / "etc/pip.conf").write_text(pip_settings()[0])
    container = store.buildah("from", "scratch")
    store.buildah("copy", container, root, "/")
    store.buildah("config", "--env", f"NODE_EXTRA_CA_CERTS={CERTIFICATES}", container)
    store.buildah("commit", "--rm", container, "localhost/python-of-debian")
    shutil.rmtree(root)
    return "localhost/python-of-debian"


@dataclass(frozen=True)
class Image:
    """A built image, with a container of it."""

    kind: str
    store: Store
    container: str
    about: dict[str, Any]

    def command(self, *arguments: str | Path, mounts: tuple[Path, ...] = (), user: int = USER) -> list[str]:
        options = [f"--volume={folder}:{folder}" for folder in mounts]
        if user != USER:  # as docs/clusters.md says
            options += [f"--user={user}:{user}", "--env=HOME=/tmp"]
        return self.store.command("run", "--isolation", "chroot", *options, self.container, "--", *arguments)

    def says(self, *arguments: str | Path, **options: Any) -> str:
        return say(*self.command(*arguments, **options))

    def has(self, program: str) -> bool:
        command = self.command("sh", "-c", f"command -v {program}")
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module", params=["gpu", "cpu"])
def image(request: pytest.FixtureRequest, store: Store, base: str) -> Iterator[Image]:
    index = os.environ.get("TORCH_CPU_INDEX", "")
    if request.param == "cpu" and not index:
        pytest.skip("TORCH_CPU_INDEX names no index of wheels of torch and torchvision for CPUs")
    if (free := shutil.disk_usage(store.folder).free / 1e9) < SPACE_GB[request.param]:
        pytest.skip(f"needs {SPACE_GB[request.param]} GB on disk, {free:.0f} GB are free")
    context = store.folder / "context"
    _copy_tracked(context)
    options = [f"--build-arg=PYTHON_IMAGE={base}", "--build-arg=REVISION=abc"]
    folders = pip_settings()[1]
    if request.param == "cpu":
        options.append(f"--build-arg=TORCH_INDEX={index}")
        _pin(context / "constraints.txt", os.environ.get("TORCH_CPU_PINS", "").split())
        folders += [Path(index.removeprefix("file://")).parent] if index.startswith("file://") else []
    options += [f"--volume={folder}:{folder}:ro" for folder in folders]
    store.buildah("bud", "--isolation", "chroot", "--format", "docker", *options, "--tag", request.param, context)
    about = json.loads(store.buildah("inspect", "--type", "image", request.param))
    container = store.buildah("from", "--pull-never", request.param)
    yield Image(request.param, store, container, about)
    store.buildah("rm", container)
    store.buildah("rmi", request.param)
    shutil.rmtree(context)


def _copy_tracked(context: Path) -> None:
    """Lay out what a fresh clone has."""
    listed = say("git", "ls-files", "-z", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, context / name)


def _pin(constraints: Path, pins: list[str]) -> None:
    """Put other versions in place of those of the same packages."""
    names = {pin.partition("==")[0] for pin in pins}
    lines = [line for line in constraints.read_text().splitlines() if line.partition("==")[0] not in names]
    constraints.write_text("\n".join([*lines, *pins, ""]))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder of the image's user."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    found = tmp_path / "out"
    found.mkdir()
    os.chown(found, USER, USER)
    return found


def test_size_layers_labels_and_user(image: Image, capsys: pytest.CaptureFixture[str]) -> None:
    config = image.about["Docker"]["config"]
    labels = {key.rpartition(".")[2]: value for key, value in config["Labels"].items()}
    assert (labels["version"], labels["revision"], labels["licenses"]) == (wsi_gradcam.__version__, "abc", "Apache-2.0")
    assert config["User"] == str(USER)
    assert config["Entrypoint"] == ["wsi-gradcam"]
    (listed,) = json.loads(image.store.buildah("images", "--json", image.kind))
    layers = len(image.about["OCIv1"]["rootfs"]["diff_ids"])
    assert layers <= 3
    with capsys.disabled():
        print(f"\nimage for {image.kind}: {listed['size']}, {layers} layers, storage {image.store.driver}")


def test_a_compiler_is_in_the_image_for_gpus_alone_and_openvino_in_the_other(image: Image) -> None:
    assert image.says("id", "-u").strip() == str(USER)
    assert not any(map(image.has, ("npm", "node", "g++")))
    assert image.has("gcc") == (image.kind == "gpu")
    packages = image.says("ls", SITE).split()
    assert ("openvino" in packages, "triton" in packages) == (image.kind == "cpu", image.kind == "gpu")
    assert "OK" in image.says("python3", "-c", "import torch, timm, distributed, pyarrow; print('OK')")
    if image.kind == "gpu":
        image.says("python3", "-c", EXTENSION)


def test_it_demonstrates_and_shows_as_its_user(image: Image, out: Path) -> None:
    told = image.says("wsi-gradcam", "demo", "--out", out / "demo", mounts=(out,))
    assert re.search(r"gradcam: tumour +0\.98", told)  # the AUROC, by the pathologists' outlines
    assert {file.stat().st_uid for file in out.rglob("*")} == {USER}
    with socket.socket() as free:
        free.bind(("127.0.0.1", PORT))  # the check of health knows this port alone
    (results,) = {file.parent for file in out.rglob("slides.csv")}
    server = subprocess.Popen(
        image.command("wsi-gradcam", "view", results, mounts=(out,)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert b"openseadragon" in _page()
        assert _is_healthy(image)
        os.killpg(server.pid, signal.SIGSTOP)
        assert not _is_healthy(image)
    finally:
        for sent in (signal.SIGCONT, signal.SIGTERM):
            os.killpg(server.pid, sent)
        server.wait(30)


def _page() -> bytes:
    """The page of `view`, once it is there."""
    for _ in range(120):
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=30)
        try:
            connection.request("GET", "/")
            answer = connection.getresponse()
            assert answer.status == 200
            return answer.read()
        except ConnectionRefusedError:
            time.sleep(1)
        finally:
            connection.close()
    raise AssertionError("view does not listen")


def _is_healthy(image: Image) -> bool:
    """Whether the image's own check says so, run in the image."""
    kind, *command = image.about["Docker"]["config"]["Healthcheck"]["Test"]
    assert kind == "CMD"
    return subprocess.run(image.command(*command), capture_output=True, timeout=60, check=False).returncode == 0


def test_folders_of_another_user(image: Image, out: Path) -> None:
    """The image's user is told that it cannot write there; the folder's own, without a name or a home, can."""
    os.chown(out, OTHER, OTHER)
    refused = subprocess.run(
        image.command("wsi-gradcam", "doctor", "--out", out, mounts=(out,)), text=True, capture_output=True, check=False
    )
    assert refused.returncode == 1
    assert "fail" in refused.stdout
    assert "ermission" in refused.stdout
    image.says("wsi-gradcam", "doctor", "--out", out, mounts=(out,), user=OTHER)
