"""The plain package explains, audits and shows its results as files; what needs more names the extra that brings it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.runs import ROOT, SMALL, flags, toy_file
from tests.synthetic import write_marker_slide

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# An interpreter in which packages named in its first argument are not installed. It calls the functions and command
# lines of the second, and prints how each has ended and what it has said.
PROGRAM = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.machinery import PathFinder

hidden, calls = map(json.loads, sys.argv[1:])

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]

from wsi_gradcam.cli.main import main

def ended(call):
    out, said = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(said):
        try:
            code = main(call) if isinstance(call, list) else exec(call)
        except Exception as error:
            code, said = type(error).__name__, io.StringIO(str(error))
    return code, out.getvalue(), said.getvalue()

if __name__ == "__main__":
    found = [ended(call) for call in calls]
    print(json.dumps([found, sorted(set(hidden) & {name.partition(".")[0] for name in sys.modules})]))
"""


def packages(extras: Sequence[str]) -> set[str]:
    """Names under which the packages of extras are imported."""
    return {re.split(r"[<>=; ]", requirement)[0].replace("-", "_") for extra in extras for requirement in EXTRAS[extra]}


IN_ALL = re.split(r"[\[\],]", EXTRAS["all"][0])[1:-1]


def without(calls: Sequence[list[str] | str], cwd: Path = ROOT) -> list[tuple[Any, str, str]]:
    """How calls end where no extra is installed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(sorted(packages(IN_ALL))), json.dumps(calls)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, imported = json.loads(done.stdout.splitlines()[-1])
    assert imported == []
    return [tuple(each) for each in found]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_marker_slide(folder / "a.tif", 390, 500, mpp=0.25, markers=[(200, 200)], marker_px=16)
    toy_file(folder, "pooled_linear")
    (folder / "a.h5").write_bytes(b"\x89HDF")
    return folder


def explaining(folder: Path, *more: str, slide: str = "a.tif", model: str = "pooled_linear.yaml") -> list[str]:
    given = [
        slide if "://" in slide else str(folder / slide),
        "--model",
        str(folder / model) if "." in model else model,
    ]
    return ["explain", *given, "--trust-code", "--out", str(folder / "out"), *flags(SMALL), *more]


def test_the_plain_package_explains_and_exports(made: Path) -> None:
    out = str(made / "out")
    calls: list[list[str] | str] = [
        explaining(made),
        "import wsi_gradcam.audit.running, wsi_gradcam.audit.report.page, wsi_gradcam.demo",  # `make dist` runs them
        ["validate", out],
        ["status", out],
        ["info", out],
        *(["export", out, "--to", to] for to in ("png", "geojson", "qupath", "ome-tiff", "ome-zarr-0.4", "deepzoom")),
    ]
    for call, (code, _, said) in zip(calls, without(calls), strict=True):
        assert code in (0, None), f"{call}: {said}"


@pytest.fixture(scope="module")
def refused(made: Path) -> dict[str, tuple[Any, str, str]]:
    """What tasks that need an extra end with, by names."""
    out, result = str(made / "of result"), f"import wsi_gradcam as w; r = w.open_result({str(made / 'of result')!r}); "
    calls: dict[str, list[str] | str] = {
        "made": [*explaining(made), "--out", out],
        "view": ["view", out],
        "workers": [*explaining(made), "--workers", "2"],
        "scheduler": [*explaining(made), "--scheduler", "tcp://127.0.0.1:1"],
        "slide in a bucket": explaining(made, slide="s3://bucket/a.svs"),
        "slides in a bucket": explaining(made, slide="s3://bucket/archive/"),
        "slide on a server": explaining(made, slide="https://host.invalid/a.svs"),
        "results in a bucket": [*explaining(made), "--out", "s3://bucket/out"],
        "timm": explaining(made, model="timm:resnet18"),
        "torchvision": ["info", "--model", "torchvision:resnet18"],
        "patches": result + "r.patches",
        "patches of a slide": result + "next(iter(r)).patches",
        "heatmap": result + "r.heatmap('gradcam: marker')",
        "coverage": result + "next(iter(r)).coverage()",
        "features": "from wsi_gradcam.mil.feature_files import *; from wsi_gradcam.mil.features import SlideFrame; "
        f"open_features({str(made)!r}, SlideFrame('a.tif', (390, 500), (0.25, 0.25)))",
        "openvino": explaining(made, "--engine", "openvino", "--overwrite"),
    }
    return dict(zip(calls, without(list(calls.values())), strict=True))


EXPECTED = {
    "view": "viewer",
    "workers": "cluster",
    "scheduler": "cluster",
    "slide in a bucket": "remote",
    "slides in a bucket": "remote",
    "slide on a server": "remote",
    "results in a bucket": "remote",
    "timm": "timm",
    "torchvision": "timm",
    "patches": "xarray",
    "patches of a slide": "xarray",
    "heatmap": "xarray",
    "coverage": "xarray",
    "features": "features",
    "openvino": "engines",
}


@pytest.mark.parametrize("what", EXPECTED)
def test_what_needs_an_extra_names_it_in_one_line(refused: dict[str, tuple[Any, str, str]], what: str) -> None:
    assert refused["made"][0] == 0
    code, _, said = refused[what]
    assert code in (1, 2, "MissingExtraError")
    last = said.splitlines()[-1]
    assert last.endswith(f"pip install 'wsi-gradcam[{EXPECTED[what]}]'")
    assert "not installed" in last
    assert "Traceback" not in said


def test_all_and_dev_bring_every_extra() -> None:
    apart = {
        "all",
        "bench",
        "dev",
        "docs",
        "napari",
        "release",
        "test",
    }  # napari brings Qt; the others are for developers
    assert set(IN_ALL) == EXTRAS.keys() - apart
    assert EXTRAS["dev"][0] == "wsi-gradcam[all,bench,docs,release,test]"


def test_no_extra_brings_what_is_there_anyway() -> None:
    core = {re.split(r"[<>=; ]", requirement)[0] for requirement in PROJECT["dependencies"]}
    for extra in IN_ALL:
        assert not core & {re.split(r"[<>=; ]", requirement)[0] for requirement in EXTRAS[extra]}, extra
