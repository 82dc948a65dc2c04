"""The benchmark of start and size counts what pip would install, and compares two checkouts in turns."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from benchmarks import start
from tests.runs import ROOT


def test_requirements_are_followed_and_extras_only_where_asked_for() -> None:
    plain = start.needed(["rich>=13"])
    assert {"rich", "markdown-it-py", "mdurl", "pygments"} == set(plain)
    assert "jinja2" not in start.needed(["packaging"])
    assert {"moto", "flask"} <= start.needed(["moto[server]"]).keys()
    assert "flask-cors" not in start.needed(["moto"])


def test_optional_packages_are_not_counted() -> None:
    """Nor is this environment's own record of the package, which may be older than pyproject.toml."""
    found = start.installed(ROOT)
    assert 0 < found["mb_without_torch"] < found["mb"]
    names = start.needed(["torch>=2.6", "zarr>=3.1"])
    assert "torch" in names
    assert "dask" not in names
    assert all(canonicalize_name(name) == name for name in names)


def test_bytecode_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("pass")
    (tmp_path / "a.pyc").write_bytes(b"0")
    assert [path.name for path in sorted(tmp_path.iterdir()) if start.is_counted(path)] == ["a.py"]
    size = start.size_of(distribution("packaging"))
    assert 100_000 < size < 2_000_000


def test_ratios_are_of_the_medians_that_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sides take turns; each process is charged with its own time alone."""
    asked = []

    def cpu_of(command: tuple[str, ...], checkout: Path) -> float:
        asked.append((command, checkout.name))
        return {"here": 2.0, "there": 1.0}[checkout.name] * (1 + len(command))

    monkeypatch.setattr(start, "cpu_of", cpu_of)
    monkeypatch.setattr(start, "installed", lambda checkout: {"packages": 1})
    found = start.figures_of({"ours": Path("here"), "theirs": Path("there")}, turns=3)
    assert found["ratios"]["help_over_theirs"] == 2.0
    assert found["ratios"]["explain_help_over_python"] == 5 / 3
    assert asked[:2] == [(start.COMMANDS["python"], "here"), (start.COMMANDS["python"], "there")]
    assert len(asked) == 2 * 3 * len(start.COMMANDS)


def test_the_command_line_answers_in_the_time_of_a_few_bare_interpreters() -> None:
    """In CPU time, which other processes hardly change: `--help` loads nothing heavy."""
    bare = min(start.cpu_of(start.COMMANDS["python"], ROOT) for _ in range(3))
    assert min(start.cpu_of(start.COMMANDS["help"], ROOT) for _ in range(3)) < 15 * bare
