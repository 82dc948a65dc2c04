"""`wsi-gradcam ARGUMENTS` in the process of the tests, and what there is to run it on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import SMALL, flags, toy_file
from tests.synthetic import write_marker_slide
from wsi_gradcam.api import explain
from wsi_gradcam.cli.main import main

Run = Callable[..., tuple[int, str, str]]
SMALL_FLAGS = flags(SMALL)


def calling(capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs the command: exit code, standard output, standard error."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def write_inputs(folder: Path) -> Path:
    """Slides `a.tif` (a marker) and `b.tif` (none), and model files."""
    (folder / "slides").mkdir()
    write_marker_slide(folder / "slides" / "a.tif", 390, 500, mpp=0.25, markers=[(200, 200)], marker_px=16)
    write_marker_slide(folder / "slides" / "b.tif", 250, 300, mpp=0.25, markers=[], marker_px=16, seed=2)
    for name in ("pooled_linear", "other_linear", "wrong_shape", "pair", "not_a_module", "not_a_number"):
        toy_file(folder, name)
    toy_file(folder, "gone", source="tests.toy_models:gone")
    toy_file(folder, "mpp_unknown", source="tests.toy_models:pooled_linear", mpp=None)
    toy_file(folder, "three_classes", source="tests.toy_models:pooled_linear", classes=["a", "b", "c"])
    toy_file(folder, "unknown_key", source="tests.toy_models:pooled_linear", layr="features")
    (folder / "empty").mkdir()
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.PNG").write_bytes(b"")
    (folder / "file").write_text("a file", encoding="utf-8")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command, called in the process of the tests."""
    return calling(capsys)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the slides and model files of `write_inputs`."""
    return write_inputs(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def finished(made: Path) -> Path:
    """The results of both slides."""
    out = made / "finished"
    explain(made / "slides", str(made / "pooled_linear.yaml"), out, **SMALL)
    return out


def only_error(err: str) -> str:
    """The one line that standard error holds, without its "error: "."""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")
