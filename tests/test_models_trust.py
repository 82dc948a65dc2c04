"""Models whose loading runs code: nothing of them runs before it is allowed, and permission comes from nobody else."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from tests.cli_runs import Run, run  # noqa: F401 - a fixture
from tests.runs import SMALL, flags, toy_file, toy_values
from tests.synthetic import write_marker_slide
from wsi_gradcam.api import explain, preview
from wsi_gradcam.audit.images import audit_images
from wsi_gradcam.audit.running import audit_run
from wsi_gradcam.cam.targets import function_digest
from wsi_gradcam.doctor.checks import examine
from wsi_gradcam.errors import ModelError, TargetError
from wsi_gradcam.gradcam import GradCAM
from wsi_gradcam.models.load import load_model, model_of
from wsi_gradcam.models.spec import BUNDLED, ModelSpec, bundled, read_spec

pytestmark = [
    pytest.mark.usefixtures("asking"),
    pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:coroutine"),
]

REFUSED = "loading it runs code that it contains, so it was not loaded"
SPY = """
from pathlib import Path
import torch
Path(__file__).with_name("ran").write_text("yes")
class Net(torch.nn.Sequential):
    def __init__(self):
        pooled = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        super().__init__(torch.nn.Conv2d(3, 4, 8, stride=8), torch.nn.ReLU(), *pooled, torch.nn.Linear(4, 2))
def build():
    return Net()
"""
PATCH = {"patch_px": 32, "mpp": 0.5}


class Writes(nn.Module):
    """A network that makes a file when it runs."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.conv = nn.Conv2d(3, 4, 8, stride=8)
        self.head = nn.Linear(4, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        written = torch.from_file(self.path, True, 4)
        logits: torch.Tensor = self.head(self.conv(images).relu().mean(dim=(2, 3))) + 0 * written.sum()
        return logits


def pooled() -> nn.Module:
    layers = nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    return nn.Sequential(*layers).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with a model of each source that runs code; `ran` appears in it when one does."""
    before = set(sys.modules)
    (tmp_path / "spy_net.py").write_text(SPY)
    program: Any = torch.jit.script(Writes(str(tmp_path / "ran")).eval())
    (tmp_path / "zoo").mkdir()
    for path in (tmp_path / "program.pt", tmp_path / "zoo" / "torchscript_model.pt"):
        program.save(str(path))
    config = {
        "num_classes": 2,
        "class_names": ["a", "b"],
        "patch_size_pixels": 32,
        "spacing_um_px": 0.5,
        "transform": [{"name": "ToTensor"}],
    }
    (tmp_path / "zoo" / "config.json").write_text(json.dumps(config))
    network = pooled()
    torch.export.save(torch.export.export(network, (torch.zeros(1, 3, 32, 32),)), tmp_path / "program.pt2")
    for name, source in SOURCES.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"source": source, **PATCH}))
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


SOURCES = {
    "function": "spy_net:build",
    "torchscript": "torchscript:program.pt",
    "export": "export:program.pt2",
    "wsinfer": "wsinfer:zoo",
}
FILES = {
    "function": "spy_net.py",
    "torchscript": "program.pt",
    "export": "program.pt2",
    "wsinfer": "zoo/torchscript_model.pt",
}
CALLS: dict[str, Callable[[Path, Path], object]] = {
    "load_model": lambda model, at: load_model(str(model)),
    "GradCAM": lambda model, at: GradCAM(model),
    "explain": lambda model, at: explain(at / "a.tif", model, at / "out", **SMALL),
    "explain with workers": lambda model, at: explain(at / "a.tif", model, at / "out", workers=1, **SMALL),
    "preview": lambda model, at: preview(at / "a.tif", model, at / "out", **SMALL),
    "audit_images": lambda model, at: audit_images(np.zeros((8, 32, 32, 3), np.uint8), model),
    "doctor": lambda model, at: list(examine(model=str(model))),
}


@pytest.mark.parametrize("call", CALLS)
def test_no_call_runs_code_that_is_not_allowed(call: str, folder: Path) -> None:
    write_marker_slide(folder / "a.tif", 130, 130, mpp=0.25, markers=[], marker_px=16)
    with pytest.raises(ModelError, match=f"^spy_net:build: {REFUSED}; .*--trust-code.*trust_code=True"):
        CALLS[call](folder / "function.yaml", folder)
    assert not (folder / "ran").exists()
    assert not (folder / "out").exists()
    assert "spy_net" not in sys.modules


@pytest.mark.parametrize("name", SOURCES)
def test_no_source_runs_code_that_is_not_allowed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    with monkeypatch.context() as patch:
        for module in (torch.jit, torch.export):
            patch.setattr(module, "load", lambda *_, **__: opened.append(name))
        for given in (folder / f"{name}.yaml", folder / Path(FILES[name]).parts[0]):
            if given.suffix != ".py":
                with pytest.raises(ModelError, match=REFUSED):
                    load_model(str(given))
    assert not opened
    assert not (folder / "ran").exists()
    assert load_model(str(folder / f"{name}.yaml"), trust_code=True).runs_code
    assert (folder / "ran").exists() == (name != "export")


@pytest.mark.parametrize("name", SOURCES)
def test_a_wrong_digest_is_noticed_before_anything_runs(name: str, folder: Path) -> None:
    spec = read_spec(str(folder / f"{name}.yaml"))
    true = hashlib.sha256((folder / FILES[name]).read_bytes()).hexdigest()
    with pytest.raises(ModelError, match=f"has sha256 {true}, expected {'0' * 64}"):
        load_model(spec.model_copy(update={"sha256": "0" * 64}), trust_code=True)
    assert not (folder / "ran").exists()
    load_model(spec.model_copy(update={"sha256": true}), trust_code=True)


def test_wrong_weights_are_noticed_before_the_function_runs(folder: Path) -> None:
    (folder / "w.pt").write_bytes(b"not these")
    spec = read_spec(str(folder / "function.yaml")).model_copy(update={"weights": "w.pt", "sha256": "0" * 64})
    with pytest.raises(ModelError, match="has sha256"):
        load_model(spec, trust_code=True)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", SOURCES)
def test_info_tells_what_can_be_told_without_loading(name: str, folder: Path, run: Run) -> None:  # noqa: F811
    code, out, err = run("info", "--model", folder / f"{name}.yaml", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)[0]
    assert told["sha256"] == hashlib.sha256((folder / FILES[name]).read_bytes()).hexdigest()
    assert (
        told["loading it"]
        == "runs code that it contains, so it was not loaded; --trust-code allows that and shows the rest"
    )
    assert not (folder / "ran").exists()
    code, out, _ = run("info", "--model", folder / f"{name}.yaml", "--json", "--trust-code")
    assert (code, json.loads(out)[0]["loading it"]) == (0, "runs code that it contains, as allowed")


def test_what_comes_along_needs_no_permission(run: Run) -> None:  # noqa: F811
    assert {read_spec(name).source for name in bundled()} == BUNDLED
    code, out, _ = run("info", "--model", "oral-tumour", "--json")
    assert (code, json.loads(out)[0]["loading it"]) == (0, "runs no code")


def test_a_network_that_the_caller_holds_needs_no_permission(tmp_path: Path) -> None:
    write_marker_slide(tmp_path / "a.tif", 130, 130, mpp=0.25, markers=[], marker_px=16)
    network = pooled()
    assert not explain(tmp_path / "a.tif", model_of(network, patch_px=32, mpp=0.5), tmp_path / "out", **SMALL).failed
    GradCAM(network)


@pytest.mark.parametrize("key", ["trust_code", "trusted", "_trusted", "trust-code"])
def test_no_file_gives_permission(key: str, folder: Path, run: Run) -> None:  # noqa: F811
    (folder / "self.yaml").write_text(yaml.safe_dump({"source": "spy_net:build", **PATCH, key: True}))
    with pytest.raises(ModelError, match="unknown key"):
        load_model(str(folder / "self.yaml"))
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": str(folder / "function.yaml"), key: True}))
    code, _, err = run("explain", folder, "--config", folder / "config.yaml", "--out", folder / "out")
    assert code == 2
    assert "unknown key" in err
    assert not (folder / "ran").exists()


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a network of the tests, allowed on the command line."""
    folder = tmp_path_factory.mktemp("explained")
    write_marker_slide(folder / "a.tif", 390, 500, mpp=0.25, markers=[(200, 200)], marker_px=16)
    model = toy_file(folder, "pooled_linear")
    assert not explain(folder / "a.tif", model, folder / "out", trust_code=True, **SMALL).failed
    return folder


def test_permission_is_stored_nowhere(explained: Path) -> None:
    for path in (explained / "out").rglob("*"):
        if path.is_file():
            assert not re.search(rb"trust(?!_objective)", path.read_bytes()), path


def test_a_run_is_continued_with_permission_alone(explained: Path, run: Run) -> None:  # noqa: F811
    again = ["explain", explained / "a.tif", "--model", explained / "pooled_linear.yaml", "--out", explained / "out"]
    assert run(*again, *flags(SMALL))[0] == 2
    code, out, _ = run(*again, *flags(SMALL), "--trust-code")
    assert (code, "1 ok" in out) == (0, True)


def test_a_script_gives_permission_once(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    for value, allowed in (("0", False), ("1", True)):
        monkeypatch.setenv("WSI_GRADCAM_TRUST_CODE", value)
        run("info", "--model", folder / "function.yaml")
        assert (folder / "ran").exists() == allowed


def test_workers_get_the_permission(explained: Path) -> None:
    done = explain(
        explained / "a.tif", explained / "pooled_linear.yaml", explained / "dask", workers=1, trust_code=True, **SMALL
    )
    assert not done.failed


def test_the_audit_of_a_strangers_results_runs_nothing(explained: Path, folder: Path, run: Run) -> None:  # noqa: F811
    shutil.copytree(explained / "out", folder / "out")
    values = yaml.safe_load((folder / "out" / "run.yaml").read_text())
    values["model"] |= {"spec": toy_values("spy_net", source="spy_net:build"), "folder": str(folder)}
    values["trust_code"] = values["model"]["trust_code"] = values["settings"]["trust_code"] = True
    (folder / "out" / "run.yaml").write_text(yaml.safe_dump(values))
    code, _, err = run("audit", folder / "out")
    assert code == 2
    assert err.count("\n") == 1
    del values["settings"]["trust_code"]
    (folder / "out" / "run.yaml").write_text(yaml.safe_dump(values))
    code, _, err = run("audit", folder / "out")
    assert (code, f"error: spy_net:build: {REFUSED}" in err) == (2, True)
    with pytest.raises(ModelError, match=REFUSED):
        audit_run(folder / "out")
    assert not (folder / "ran").exists()
    assert not (folder / "out" / "audit").exists()


def test_an_audit_is_allowed_on_the_command_line(explained: Path, run: Run) -> None:  # noqa: F811
    asked = ["audit", explained / "out", "--only", "saturation", "--patches", "8"]
    assert run(*asked)[0] == 2
    assert run(*asked, "--trust-code")[0] == 0


@pytest.mark.parametrize(
    "source",
    [
        "wsi_gradcam.cli:main",
        "wsi_gradcam.cli.main:main",
        "wsi_gradcam.export.geojson:oral_tumour",
        "wsi_gradcam.models.zoo.nets:PatchCNN",
        "builtins:input",
        "time:sleep",
        "os:abort",
        "__main__:main",
        "a/b:build",
        "spy_net:build()",
        "spy_net:__dict__",
    ],
)
@pytest.mark.parametrize("trust_code", [False, True])
def test_what_makes_no_network_is_refused_at_once(source: str, trust_code: bool, folder: Path) -> None:
    with pytest.raises(
        ModelError,
        match=r"runs code|does not return a network|does not build networks|expected module:function|has no function",
    ):
        load_model(ModelSpec(name="n", source=source, folder=folder, **PATCH), trust_code=trust_code)


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("def build() -> int:\n    raise SystemError", "does not return a network"),
        ("def build() -> None:\n    raise SystemError", "does not return a network"),
        ("from wsi_gradcam.cli.main import main as build", "does not return a network"),
        ("from time import sleep as build", "does not return a network"),
        ("def build():\n    return input()", "fails: EOFError"),
        ("import sys\ndef build():\n    sys.exit(3)", "fails: SystemExit: 3"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("async def build():\n    pass", "returned a coroutine"),
    ],
)
def test_a_function_that_makes_no_network_is_refused(code: str, problem: str, folder: Path) -> None:
    (folder / "spy_net.py").write_text(code)
    with pytest.raises(ModelError, match=problem) as caught:
        load_model(str(folder / "function.yaml"), trust_code=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["wsi_gradcam.models.zoo.nets:oral_tumour", "torchvision:resnet18", "timm:resnet18"])
@pytest.mark.parametrize("there", [True, False], ids=["folder of the model", "current folder"])
def test_nothing_beside_a_model_is_imported(source: str, there: bool, tmp_path: Path, monkeypatch: Any) -> None:
    if not there:
        monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(Path.cwd()))])
    for name in ("shapely", "json", "timm", "torch", "wsi_gradcam", "imaginary"):
        (tmp_path / f"{name}.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    monkeypatch.delitem(sys.modules, "shapely", raising=False)
    paths: list[list[str]] = []
    seed = torch.manual_seed

    def noting(number: int) -> torch.Generator:
        paths.append(list(sys.path))
        return seed(number)

    monkeypatch.setattr(torch, "manual_seed", noting)
    spec = ModelSpec(name="n", source=source, weights="random", folder=tmp_path if there else Path(), **PATCH)
    load_model(spec)
    assert not (tmp_path / "ran").exists()
    assert paths
    assert not any(str(tmp_path) in path for path in paths)


def test_installed_modules_come_before_those_beside_a_model(folder: Path) -> None:
    (folder / "shapely.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    (folder / "spy_net.py").write_text(
        SPY.replace('Path(__file__).with_name("ran")', "import shapely; Path('/dev/null')")
    )
    before = list(sys.path)
    with pytest.raises(ModelError, match=r"shapely.py is meant, but Python imports .*shapely.* installed modules"):
        load_model(str(folder / "function.yaml"), trust_code=True)
    assert not (folder / "ran").exists()
    assert sys.path == before


def test_a_model_file_beside_an_installed_module_of_its_name(folder: Path) -> None:
    (folder / "yaml.py").write_text(SPY)
    (folder / "shadowed.yaml").write_text("source: yaml:build\npatch_px: 32\n")
    with pytest.raises(ModelError, match=r"yaml.py is meant, but Python imports"):
        load_model(str(folder / "shadowed.yaml"), trust_code=True)
    assert not (folder / "ran").exists()


def test_a_target_that_is_a_function_needs_permission(
    explained: Path,
    folder: Path,
    run: Run,  # noqa: F811
    monkeypatch: Any,
) -> None:
    (folder / "spy_net.py").write_text(SPY.replace("def build():", "def build(x):\n    return x[:, 0]\ndef other():"))
    monkeypatch.chdir(folder)
    asked = ["explain", explained / "a.tif", "--model", "ihc-dab", "--out", folder / "out", "--target", "spy_net:build"]
    code, _, err = run(*asked, *flags(SMALL))
    assert (code, "target spy_net:build is not a class of the model but a function, which is code" in err) == (2, True)
    assert not (folder / "ran").exists()
    assert run(*asked, *flags(SMALL), "--trust-code")[0] == 0
    (folder / "ran").unlink()
    for model in (None, "ihc-dab"):
        with pytest.raises(TargetError, match="which is code"):
            audit_run(folder / "out", model=model if model is None else load_model(model))
    assert not (folder / "ran").exists()


def test_to_find_a_module_runs_no_parent_of_it(folder: Path, monkeypatch: Any) -> None:
    (folder / "spy_pack").mkdir()
    (folder / "spy_pack" / "__init__.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    (folder / "spy_pack" / "inner.py").write_text("x = 1\n")
    monkeypatch.chdir(folder)
    assert function_digest("spy_pack.inner:x") == hashlib.sha256(b"x = 1\n").hexdigest()
    spec = ModelSpec(name="n", source="spy_pack.inner:x", folder=folder, sha256="0" * 64, **PATCH)
    with pytest.raises(ModelError, match="has sha256"):
        load_model(spec, trust_code=True)
    assert not (folder / "ran").exists()
