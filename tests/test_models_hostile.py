"""Model files, weights and folders that are made to do harm: each is one clear line, soon, and without much memory."""

from __future__ import annotations

import json
import os
import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.cli_runs import Run, run  # noqa: F401 - a fixture
from tests.runs import toy_values
from tests.test_models_load import refused, save, spec
from tests.toy_models import pooled_linear
from wsi_gradcam.errors import MAX_MESSAGE, ConfigError, ModelError, StoreError, WsiGradcamError
from wsi_gradcam.io.documents import read_yaml, to_yaml
from wsi_gradcam.models.load import load_model
from wsi_gradcam.models.spec import MAX_SIDE_PX, read_spec
from wsi_gradcam.results.run_files import read_run
from wsi_gradcam.run.examining import check_batch
from wsi_gradcam.run.settings import read_config
from wsi_gradcam.tissue.annotations.regions import read_bytes

SOON_S = 5.0
MUCH_MIB = 200
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
PLAIN = "source: torchvision:resnet18\nweights: random\npatch_px: 64\n"
DEEP = 100_000

# What a model file may hold besides `PLAIN`, or instead of it, and what is said of it.
MODEL_FILES = {
    "aliases": (LAUGHS, "anchors and aliases are not supported"),
    "one alias": (f"{PLAIN}provenance: [&a [1], *a]\n", "line 4: anchors and aliases are not supported"),
    "contains itself": (f"{PLAIN}provenance: &a [*a]\n", "anchors and aliases are not supported"),
    "merge key": (f"{PLAIN}provenance: {{<<: {{a: 1}}}}\n", "line 4: merge keys"),
    "a key twice": (f"{PLAIN}source: timm:resnet18\n", "line 4: a key occurs twice"),
    "deep lists": ("[" * DEEP, "nested deeper than 50 levels"),
    "deep mappings": ("{a: " * DEEP, "nested deeper than 50 levels"),
    "deep blocks": ("- " * DEEP, "nested deeper than 50 levels"),
    "deep keys": ("? " * DEEP, "nested deeper than 50 levels"),
    "large": (f"{PLAIN}# {'x' * (5 << 20)}", "larger than 4 MiB"),
    "a class that runs": (f"{PLAIN}provenance: !!python/object/apply:os.system [id]\n", "could not determine a constr"),
    "a module that runs": (f"{PLAIN}provenance: !!python/module:this\n", "could not determine a constructor"),
    "a date that is none": (f"{PLAIN}provenance: 2026-99-99\n", "month must be in 1..12"),
    "a truth that is none": (f"{PLAIN}provenance: !!bool 7\n", "KeyError"),
    "long number": (f"{PLAIN}mpp: {'9' * 100_000}\n", "a number of 100000 characters"),
    "long hexadecimal": (f"{PLAIN}mpp: 0x{'f' * 100_000}\n", "a number of 100002 characters"),
    "long sexagesimal": (f"{PLAIN}mpp: 1{':1' * 100_000}\n", "a number of 200001 characters"),
    "half a pair": (f'{PLAIN}license: "\\ud800"\n', "not a YAML file"),
    "a control character": (f"{PLAIN}license: \x1b[2J\n", "control characters are not allowed"),
    "two documents": (f"{PLAIN}---\n{PLAIN}", "expected a single document"),
    "patches of 60000": ("source: torchvision:resnet18\npatch_px: 60000\n", "less than or equal to 8192"),
    "patches of 10^30": (f"source: torchvision:resnet18\npatch_px: {10**30}\n", "less than or equal to 8192"),
    "patches of nothing": ("source: torchvision:resnet18\npatch_px: 0\n", "greater than 0"),
    "patches of -1": ("source: torchvision:resnet18\npatch_px: -1\n", "greater than 0"),
    "crop of 60000": (f"{PLAIN}transform: {{crop: 60000}}\n", "less than or equal to 8192"),
    "resize to 60000": (f"{PLAIN}transform: {{resize: [60000, 1]}}\n", "less than or equal to 8192"),
    "mpp of nan": (f"{PLAIN}mpp: .nan\n", "mpp"),
    "mpp of inf": (f"{PLAIN}mpp: .inf\n", "mpp"),
    "mpp of -1": (f"{PLAIN}mpp: -1\n", "mpp"),
    "std of 0": (f"{PLAIN}std: [0, 1, 1]\n", "std.0"),
    "mean of nan": (f"{PLAIN}mean: [.nan, 0, 0]\n", "mean.0"),
    "scale of inf": (f"{PLAIN}scale: .inf\n", "scale"),
    "long name": (f"{PLAIN}name: {'n' * 100_000}\n", "at most 1000 characters"),
    "long source": (f"source: {'n' * 100_000}:m\n", "at most 5000 characters"),
    "long key": (f"{PLAIN}{'k' * 900}: 1\n", "unknown key"),
    "long value": (f"{PLAIN}activation: {'v' * 1_000_000}\n", "activation"),
    "many wrong keys": (PLAIN + "".join(f"k{i}: 1\n" for i in range(10_000)), "and 9992 more"),
    "many classes": (f"{PLAIN}classes: [{', '.join(map(str, range(100_001)))}]\n", "at most 100000 items"),
    "nested classes": (f"{PLAIN}classes: [{'[' * 40}{']' * 40}]\n", "is not a name"),
    "a folder of its own": (f"{PLAIN}folder: /etc\n", "folder: unknown key"),
    "weights of another place": (
        f"{PLAIN.replace('random', '/proc/self/mem')}",
        "cannot be read|not a plain state dict",
    ),
    "weights from a device": (f"{PLAIN.replace('random', '/dev/zero')}", "a pipe, socket or device"),
    "program from a device": ("source: torchscript:/dev/zero\npatch_px: 64\n", "a pipe, socket or device"),
    "folder for a program": ("source: torchscript:/tmp\npatch_px: 64\n", "Is a directory"),
    "a name with a zero byte": ('source: "torchscript:a\\0b"\npatch_px: 64\n', "null byte"),
    "a very long name": (f"source: torchscript:{'a' * 4000}\npatch_px: 64\n", "File name too long"),
}


@pytest.fixture(autouse=True)
def soon_and_small() -> Any:
    """Each takes a few seconds at most, and not much memory."""
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - started < SOON_S
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MUCH_MIB << 10


def told(work: Callable[[], object], kind: type[WsiGradcamError]) -> str:
    """The one short line that is said."""
    with pytest.raises(kind) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 3 * MAX_MESSAGE
    return message


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_hostile_model_file_is_one_line(name: str, tmp_path: Path) -> None:
    text, problem = MODEL_FILES[name]
    (tmp_path / "model.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=problem):
        load_model(str(tmp_path / "model.yaml"))
    assert told(lambda: load_model(str(tmp_path / "model.yaml")), ModelError).count(str(tmp_path)) <= 2


@pytest.mark.parametrize("name", [name for name, (text, _) in MODEL_FILES.items() if "source" not in text])
def test_a_hostile_config_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(MODEL_FILES[name][0], encoding="utf-8")
    assert MODEL_FILES[name][1] in told(lambda: read_config(tmp_path / "config.yaml"), ConfigError)


@pytest.mark.parametrize("text", [LAUGHS, "[" * DEEP, "a: " + "9" * 5000, "a: 2026-99-99", "&a [*a]", "x: *y", "\x00"])
def test_a_hostile_run_yaml_is_damaged(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert "run.yaml: damaged" in told(lambda: read_run(tmp_path / "run.yaml"), StoreError)


def test_a_run_yaml_of_an_older_version_may_say_a_thing_twice(tmp_path: Path) -> None:
    """The provenance of a model file with aliases was written with aliases too."""
    shared = ["a", {"b": 1}]
    values = {"run_digest": "0", "identity": {}, "model": {"provenance": {"x": shared, "y": shared}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert "&id001" in (tmp_path / "run.yaml").read_text()
    assert read_run(tmp_path / "run.yaml") == values
    assert b"&" not in to_yaml(values)
    assert read_yaml(to_yaml(values)) == values


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        os.chdir(path.parent)  # names of sockets are short
        bound.bind(path.name)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


READERS: dict[str, tuple[str, Callable[[Path], object], type[WsiGradcamError]]] = {
    "program": ("model.pt", lambda path: load_model(str(path), trust_code=True), ModelError),
    "named program": ("model.pt", lambda path: load_model(f"torchscript:{path}", trust_code=True), ModelError),
    "exported": ("model.pt2", lambda path: load_model(f"export:{path}", trust_code=True), ModelError),
    "model file": ("model.yaml", lambda path: read_spec(str(path)), ModelError),
    "weights": ("w.pt", lambda path: load_model(_file(path, weights=path.name)), ModelError),
    "safe weights": ("w.safetensors", lambda path: load_model(_file(path, weights=path.name)), ModelError),
    "stain": (
        "he.png",
        lambda path: load_model(_file(path, stain={"method": "macenko", "target": path.name})),
        ModelError,
    ),
    "configuration": ("config.json", lambda path: load_model(f"hf:{path.parent}"), ModelError),
    "WSInfer": ("torchscript_model.pt", lambda path: load_model(f"wsinfer:{path.parent}", trust_code=True), ModelError),
    "mask": ("mask.png", read_bytes, WsiGradcamError),
    "config": ("config.yaml", read_config, ConfigError),
    "run": ("run.yaml", read_run, StoreError),
}


def _file(path: Path, **keys: Any) -> str:
    """A model file beside it."""
    (path.parent / "model.yaml").write_text(yaml.safe_dump(toy_values("pooled_linear", **keys)))
    return str(path.parent / "model.yaml")


@pytest.mark.parametrize("make", [pipe, unix_socket, device, Path.mkdir])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_not_waited_for(
    name: str, make: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, read, kind = READERS[name]
    make(tmp_path / file)
    assert file in told(lambda: read(tmp_path / file), kind)


@pytest.mark.parametrize("text", ["[" * DEEP, '{"a": ' * DEEP, '{"num_classes": ' + "9" * 5000 + "}", "{", "\ud800"])
@pytest.mark.parametrize("kind", ["hf", "wsinfer"])
def test_a_hostile_configuration_is_one_line(kind: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    (tmp_path / "torchscript_model.pt").touch()
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "config.json: not a JSON file" in told(lambda: load_model(f"{kind}:{tmp_path}", trust_code=True), ModelError)


HF = {"architecture": "test_resnet", "num_classes": 2}


@pytest.mark.parametrize(
    "change",
    [
        {"num_classes": 10**12},
        {"num_classes": -1},
        {"num_classes": "many"},
        {"architecture": "../evil"},
        {"architecture": ["a"]},
        {"model_args": {"no_such_argument": 1}},
        {"model_args": [1]},
        {"pretrained_cfg": [1]},
        {"pretrained_cfg": {"input_size": "x"}},
        {"pretrained_cfg": {"input_size": [3, 60000, 60000]}},
    ],
)
def test_a_configuration_that_cannot_be_right_is_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF | change))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    told(lambda: load_model(f"hf:{tmp_path}"), ModelError)


def test_a_batch_that_no_memory_holds_is_refused(tmp_path: Path) -> None:
    model = load_model(_file(tmp_path / "x", weights="random", layer=None), trust_code=True)
    assert "a batch of 9000000 patches" in told(lambda: check_batch(model, 9_000_000), ConfigError)
    check_batch(model, "auto")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    state = load_model(_file(tmp_path / "x", weights="random")).module.state_dict()
    save_file({**state, "fc.weight": torch.full_like(state["fc.weight"], value)}, tmp_path / "w.safetensors")
    path = _file(tmp_path / "x", weights="w.safetensors")
    if value != value:
        assert "values of fc.weight are NaN" in told(lambda: load_model(path), ModelError)
    else:
        load_model(path)


def test_the_bound_of_a_patch_is_what_fits(tmp_path: Path) -> None:
    assert 2 * 3 * 4 * MAX_SIDE_PX**2 < 2 << 30  # two pictures of it are what is tried first


def test_an_archive_that_cannot_be_looked_into_is_not_given_to_torch(tmp_path: Path) -> None:
    """The description's own header disagrees with the directory, by which torch finds it."""
    path = save(tmp_path / "w.pt", pooled_linear().state_dict())
    raw = bytearray(path.read_bytes())
    name = raw.index(b"data.pkl")
    header = raw.rindex(b"PK\x03\x04", 0, name)
    raw[header + 7] |= 0x08  # names are UTF-8
    raw[name] = 0x80
    path.write_bytes(raw)
    message = refused(spec(tmp_path, weights="w.pt"))
    assert str(path) in message
    assert "damaged: it cannot be unpacked" in message
