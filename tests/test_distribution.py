"""What is published: source archive and wheel, built as `make dist` does. `make wheel` runs the demo of the wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import noxfile
import wsi_gradcam
from tests.runs import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two; the wheel is made of what the source archive holds."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(file.read(name).decode())


def tracked(*folders: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    assert tracked("wsi_gradcam") <= held
    others = {name for name in held - tracked("wsi_gradcam") if ".dist-info/" not in name}
    assert {os.path.dirname(name) for name in others} <= {"wsi_gradcam/viewer/page/vendor"}  # noqa: PTH120 - of a ZIP


def test_the_source_archive_can_be_tested_and_built(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    wanted = tracked("wsi_gradcam", "tests", "pipelines", "benchmarks", "configs", "docs", "*.md", "*.txt", "*.cff")
    assert wanted | {"Makefile", "noxfile.py", "hatch_build.py", "Dockerfile", "LICENSE", "pyproject.toml"} <= held
    assert not {name.partition("/")[0] for name in held} & {".git", ".venv", ".ci", "dist"}


def test_indexes_take_what_is_built(built: Path) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_the_metadata_say_what_is_needed(metadata: Message) -> None:
    needed = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    plain = {str(one) for one in needed if one.marker is None}
    assert plain == {str(Requirement(text)) for text in PROJECT["dependencies"]}
    assert set(metadata.get_all("Provides-Extra") or []) == PROJECT["optional-dependencies"].keys()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Version"] == wsi_gradcam.__version__


def test_the_wheel_is_found_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """With its data: the bundled models and the demo's tissue."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    code = (
        "import wsi_gradcam; from wsi_gradcam.models.spec import read_spec; from wsi_gradcam.demo import slide;"
        "print(wsi_gradcam.__file__); print(read_spec('oral-tumour').name)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.splitlines() == [str(tmp_path / "site" / "wsi_gradcam" / "__init__.py"), "oral-tumour"], (
        done.stderr
    )


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited.keys() >= {"cff-version", "message", "title", "authors"}  # what the format requires
    assert (cited["version"], cited["license"]) == (wsi_gradcam.__version__, PROJECT["license"])
    assert [author["name"] for author in cited["authors"]] == [author["name"] for author in PROJECT["authors"]]


def test_the_lowest_versions_are_those_of_the_project() -> None:
    """`make lowest` installs them; a bound of another form would not be understood."""
    for requirement in PROJECT["dependencies"]:
        low, wanted = Requirement(noxfile.lowest_of(requirement)), Requirement(requirement)
        (bound,) = wanted.specifier
        assert (low.name, bound.operator) == (wanted.name, ">=")
        assert bound.version in low.specifier
    assert PROJECT["requires-python"] == f">={noxfile.PYTHONS[0]}"


def other_python() -> str | None:
    """The newest other Python from 3.12 on that is installed, on PATH or by pyenv; None where there is none."""
    for wanted in reversed(noxfile.PYTHONS[1:]):
        installed = sorted(Path.home().glob(f".pyenv/versions/{wanted}.*/bin/python"))
        for path in filter(None, (shutil.which(f"python{wanted}"), *map(str, installed))):
            asked = [path, "-c", "import sys; print(*sys.version_info[:2], sep='.')"]
            done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
            if done.stdout.strip() == wanted:
                return path
    return None


def test_other_pythons_compile_every_module_without_a_warning(tmp_path: Path) -> None:
    """And run the doctests of those that need no package. `make pythons` runs a part of the tests under each."""
    if (python := other_python()) is None:
        pytest.skip("no Python from 3.12 on is installed")
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for arguments in (
        ("compileall", "-q", "wsi_gradcam"),
        ("doctest", "wsi_gradcam/errors.py", "wsi_gradcam/geometry.py"),
    ):
        command = [python, "-W", "error", "-m", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_pythons_are_those_that_nox_knows() -> None:
    said = [
        text.rpartition(" ")[2]
        for text in PROJECT["classifiers"]
        if text.startswith("Programming Language :: Python :: 3.")
    ]
    assert said == [version for version in noxfile.PYTHONS if version in said]
    assert all((ROOT / name).exists() for name in (*noxfile.SHORT, *noxfile.LONGER))
