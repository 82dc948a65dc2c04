"""timm, torchvision and functions: what they know of a model, and what happens when they cannot deliver."""

from __future__ import annotations

import hashlib
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import timm.models._builder
import torch
import torchvision.models._api
from torch import nn

from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.load import Model, load_model
from wsi_gradcam.models.sources.python import code_digest
from wsi_gradcam.models.spec import ModelSpec
from wsi_gradcam.system.processes import tensors_only

NET = "import torch\n\n\ndef build() -> torch.nn.Module:\n    return torch.nn.Sequential({layers})\n"
POOLED = "torch.nn.Conv2d(3, {classes}, 8, stride=8), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()"


def load(source: str, folder: Path = Path(), **values: Any) -> Model:
    return load_model(ModelSpec(**{"name": "n", "source": source, "weights": "random", "folder": folder, **values}))


def refused(source: str, folder: Path = Path(), **values: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(source, folder, **values)
    return str(caught.value)


def offline(*args: object, **kwargs: object) -> NoReturn:
    raise OSError(101, "Network is unreachable")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for fetch in ("load_state_dict_from_hf", "load_state_dict_from_url"):
        monkeypatch.setattr(timm.models._builder, fetch, offline)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: [])  # there is a name server, but no more


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for modules of the test's own; they are forgotten afterwards."""
    before, path = set(sys.modules), list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("source", ["timm:resnet10t", "torchvision:squeezenet1_1"])
def test_published_weights_without_a_network_are_one_clear_line(source: str) -> None:
    message = refused(source, weights=None)
    assert message.startswith(f"{source}: the published weights are not available (OSError: ")
    assert "Network is unreachable" in message
    assert "'weights:' in a model file, or use 'weights: random'" in message
    assert "\n" not in message


def test_without_a_name_server_published_weights_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    started = time.perf_counter()
    assert "are not available (cannot reach huggingface.co: [Errno 101]" in refused("timm:resnet10t", weights=None)
    assert time.perf_counter() - started < 10  # the hub's client would try for 50 s


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("source", ["timm:resnet10t", "torchvision:squeezenet1_1"])
def test_untrained_networks_need_no_network(source: str) -> None:
    assert load(source, classes=["a", "b", "c"], patch_px=64).classes == ("a", "b", "c")


def test_untrained_is_never_taken_for_published() -> None:
    assert "timm:botnet50ts_256: it has no published weights" in refused("timm:botnet50ts_256", weights=None)


@pytest.mark.parametrize("source", ["timm:test_convnext", "torchvision:squeezenet1_1"])
def test_published_weights_never_get_an_untrained_head(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def untrained(create: Callable[..., nn.Module], key: str, value: object) -> Callable[..., nn.Module]:
        return lambda name, **arguments: create(name, **{**arguments, key: value})

    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: [])
    monkeypatch.setattr(timm, "create_model", untrained(timm.create_model, "pretrained", False))
    monkeypatch.setattr(torchvision.models, "get_model", untrained(torchvision.models.get_model, "weights", None))
    message = refused(source, weights=None, classes=["a", "b"])
    assert "2 classes are named, but the model has 1000 outputs" in message


def test_timm_knows_the_input() -> None:
    model = load("timm:test_convnext")
    assert (model.patch_px, len(model.classes)) == ((160, 160), 1000)
    assert (model.mean, model.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_torchvision_knows_the_input_and_the_classes() -> None:
    model = load("torchvision:squeezenet1_1")
    assert (model.patch_px, len(model.classes), len(set(model.classes))) == ((224, 224), 1000, 1000)
    assert model.classes[207] == "golden retriever"
    assert (model.mean, model.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_what_the_model_file_says_goes_first() -> None:
    model = load("timm:test_convnext", patch_px=96, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], classes=["x", "y"])
    assert (model.patch_px, model.mean, model.std) == ((96, 96), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert model.classes == ("x", "y")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("timm:resnet18x", "timm has no such model; did you mean resnet18"),
        ("timm:zz", "timm has no such model; timm.list_models"),
        ("timm:", "timm has no such model"),
        ("timm:hf-hub:someone/model", "timm has no such model"),
        ("torchvision:resnet19", "torchvision has no such model; did you mean resnet1"),
        ("torchvision:ssd300_vgg16", "not an image classifier"),
        ("torchvision:fcn_resnet50", "not an image classifier"),
        ("yaml:no_such_function", "'yaml' has no function 'no_such_function'"),
        ("yaml:__doc__", "'yaml' has no function '__doc__'"),
        ("yaml:", "expected module:function"),
        ("no_such_module:build", "cannot import 'no_such_module'"),
        (":build", "expected module:function"),
        ("..:build", "expected module:function"),
        ("../evil:build", "expected module:function"),
        ("resnet18", "expected module:function"),
        ("yaml:dump", "dump() fails: TypeError"),
        ("yaml:SafeDumper", "SafeDumper() fails: TypeError"),
        ("collections:OrderedDict", "collections does not build networks"),
        ("tests.toys:Path", "returned a PosixPath, expected a torch.nn.Module"),
    ],
)
def test_a_source_that_gives_no_network_is_refused(source: str, problem: str) -> None:
    message = refused(source)
    assert message.startswith(source.rstrip())
    assert problem in message


def test_a_function_may_lie_beside_the_model_file(folder: Path) -> None:
    (folder / "net_beside.py").write_text(NET.format(layers=POOLED.format(classes=4)))
    assert len(load("net_beside:build", folder, patch_px=32).classes) == 4


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import no_such_thing", "cannot import 'net_broken' (ModuleNotFoundError: No module named 'no_such_thing')"),
        ("def build(:", "cannot import 'net_broken' (SyntaxError"),
        ("1 / 0", "cannot import 'net_broken' (ZeroDivisionError"),
        ("def build(size):\n    return size", "build() fails: TypeError"),
        ("def build():\n    raise OSError('no\\nfile')", "build() fails: OSError: no file"),
    ],
)
def test_code_that_fails_is_named(code: str, problem: str, folder: Path) -> None:
    (folder / "net_broken.py").write_text(code)
    message = refused("net_broken:build", folder, patch_px=32)
    assert problem in message
    assert "\n" not in message


def test_a_namesake_loaded_before_is_not_taken_for_it(folder: Path) -> None:
    for name, classes in (("a", 2), ("b", 3)):
        (folder / name).mkdir()
        (folder / name / "net_twice.py").write_text(NET.format(layers=POOLED.format(classes=classes)))
    assert len(load("net_twice:build", folder / "a", patch_px=32).classes) == 2
    message = refused("net_twice:build", folder / "b", patch_px=32)
    assert str(folder / "a" / "net_twice.py") in message
    assert "rename one of them" in message
    assert len(load("net_twice:build", folder / "a", patch_px=32).classes) == 2


def test_the_digest_tells_the_source_code(folder: Path) -> None:
    path, digests = folder / "net_edited.py", []
    for remark in ("", "# changed\n", ""):
        path.write_text(NET.format(layers=POOLED.format(classes=2)) + remark)
        sys.modules.pop("net_edited", None)
        digests.append(load("net_edited:build", folder, patch_px=32).digest)
    assert digests[0] == digests[2] != digests[1]


def write_package(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


PACKAGE = {
    "pack_a/__init__.py": "",
    "pack_a/nets.py": "import json\nfrom . import parts\nfrom pack_a.deep.more import width\n"
    + NET.format(layers=POOLED.format(classes=2)),
    "pack_a/parts.py": "import pack_a.nets\n",
    "pack_a/deep/__init__.py": "",
    "pack_a/deep/more.py": "width = 3\n",
    "pack_a/other.py": "x = 1\n",
}


@pytest.mark.parametrize(
    ("file", "matters"),
    [
        ("pack_a/nets.py", True),
        ("pack_a/parts.py", True),
        ("pack_a/deep/more.py", True),
        ("pack_a/other.py", False),
    ],
)
def test_the_digest_tells_the_code_that_the_source_imports(file: str, matters: bool, folder: Path) -> None:
    write_package(folder, PACKAGE)
    first = load("pack_a.nets:build", folder, patch_px=32).digest
    with (folder / file).open("a") as text:
        text.write("# changed\n")
    assert (load("pack_a.nets:build", folder, patch_px=32).digest != first) == matters


def test_the_digest_follows_modules_that_lie_beside(folder: Path) -> None:
    write_package(
        folder,
        {
            "near.py": "x = 1\n",
            "net_near.py": "import near\nimport torch\n" + NET.format(layers=POOLED.format(classes=2)),
        },
    )
    first = load("net_near:build", folder, patch_px=32).digest
    (folder / "near.py").write_text("x = 2\n")
    assert load("net_near:build", folder, patch_px=32).digest != first


def test_the_digest_of_a_single_module_is_that_of_its_file(folder: Path) -> None:
    (folder / "net_single.py").write_text("import json\n")
    path = folder / "net_single.py"
    assert code_digest("net_single", str(path)) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert code_digest("net_single", None) == ""


def test_pickles_of_libraries_are_read_as_tensors_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.save({"a": Path("x")}, tmp_path / "object.pt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with tensors_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "object.pt", weights_only=False)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert torch.load(tmp_path / "object.pt", weights_only=False) == {"a": Path("x")}
