"""Environments besides `.venv`: other versions of Python, the lowest versions of packages, and the wheel alone.

    .venv/bin/nox --session wheel-3.11             # dist/*.whl in an empty environment: the demo, outside the checkout
    .venv/bin/nox --session tests-3.13             # a part of the tests under another Python, which must be installed
    .venv/bin/nox --session tests-3.13 -- -n 2     # all of them
    .venv/bin/nox --session lowest                 # the lowest versions that pyproject.toml allows

An environment is some 6 GB below .nox, mostly CUDA: remove it afterwards. `make wheel`, `make pythons` and `make
lowest` do. Pythons of pyenv are found where PYENV_VERSION names them: `PYENV_VERSION=3.11.7:3.13.0 make pythons`.
"""

from __future__ import annotations

import re
import shutil
import time
import tomllib
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
# What says most of the packages below: reading, explaining, stitching, storing, validating, and what is drawn.
SHORT = [
    "tests/test_end_to_end.py",
    "tests/test_slides.py",
    "tests/test_cam_methods.py",
    "tests/test_results_stitch.py",
    "tests/test_results_digests.py",
]
# And where all extras are installed: processes, clusters, slide-level models, evidence, pages, the command line.
LONGER = [
    "wsi_gradcam",  # doctests
    "tests/test_audit_run.py",
    "tests/test_card.py",
    "tests/test_cli_main.py",
    "tests/test_cli_mistakes.py",
    "tests/test_evidence_run.py",
    "tests/test_executors_local.py",
    "tests/test_export.py",
    "tests/test_mil_runs.py",
    "tests/test_out_on_s3.py",
    "tests/test_system_isolation.py",
    "tests/test_viewer_app.py",
]
# What the first ones import beside the package; the extra `test` needs newer versions of packages than `explain` does.
TOOLS = ["pytest", "pytest-cov", "pytest-timeout", "hypothesis", "captum", "pandas"]
nox.options.sessions = ["wheel"]
nox.options.default_venv_backend = "venv"


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run a part of the tests under this Python, or what is given behind --, with the pinned versions of packages."""
    session.install("--constraint", "constraints.txt", "--editable", ".[all,bench,test]")
    session.run("python", "-m", "pytest", "--no-cov", *(session.posargs or [*SHORT, *LONGER]))


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """Run a short part of the tests with the lowest versions that `pyproject.toml` allows of what `explain` needs."""
    bounds = Path(session.create_tmp()) / "lowest.txt"
    bounds.write_text("\n".join(map(lowest_of, PROJECT["dependencies"])) + "\n", encoding="utf-8")
    session.install("--constraint", str(bounds), "--editable", ".[timm]", *TOOLS)
    session.run("python", "-W", "ignore", "-m", "pytest", "--no-cov", "-W", "ignore", *(session.posargs or SHORT))


def lowest_of(requirement: str) -> str:
    """Return the requirement of the lowest release that another allows, and of its patches.

    >>> lowest_of("torch>=2.6"), lowest_of("openslide-bin>=4.0.1.1")
    ('torch==2.6.*', 'openslide-bin==4.0.1.1')
    """
    name, version = re.split(">=", requirement)
    return f"{name}=={version}" if version.count(".") > 1 else f"{name}=={version}.*"


@nox.session(python=PYTHONS)
def wheel(session: nox.Session) -> None:
    """Install the wheel of `make dist` into an empty environment, and run its demo outside the checkout."""
    (made,) = (ROOT / "dist").glob("*.whl")
    started = time.monotonic()
    session.install("--constraint", "constraints.txt", str(made))
    session.log(f"installed in {time.monotonic() - started:.0f} s, {_megabytes(Path(session.virtualenv.location))} MB")
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder / "demo", ignore_errors=True)
    with session.chdir(folder):
        started = time.monotonic()
        session.run("python", "-m", "pip", "check")
        session.run("wsi-gradcam", "demo", "--out", "demo", env={"PYTHONPATH": ""})
        session.log(f"the demo took {time.monotonic() - started:.0f} s")
        (results,) = (path.parent for path in folder.glob("demo/*/run.yaml"))
        session.run("wsi-gradcam", "validate", str(results))
        missing = session.run("wsi-gradcam", "view", str(results), success_codes=[2], silent=True)
        assert isinstance(missing, str)
        assert "pip install 'wsi-gradcam[viewer]'" in missing


def _megabytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) // 10**6
