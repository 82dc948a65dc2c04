"""What importing costs, and which room may know which."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.house import ROOMS, ROOT, imports_of, modules, room_imports, room_of
from tests.synthetic import write_marker_slide

HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "dask",
    "distributed",
    "zarr",
    "numpy",
    "pydantic",
    "openslide",
    "matplotlib",
    "obstore",
)


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_room_has_its_place() -> None:
    found = {room_of(module) for module in modules()} - {""}
    assert found == set(ROOMS), "a new room: give it its place in tests/house.py, and say why in docs/architecture.md"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_before_it(room: str) -> None:
    for other, module in room_imports()[room].items():
        assert ROOMS.index(other) < ROOMS.index(room), f"{module} imports from {other}, which stands after {room}"


def test_modules_form_no_circle() -> None:
    """Imports for type checking count here: a circle of them is a circle of ideas."""
    graph = {
        module: {n.removeprefix("wsi_gradcam.") for n in imports_of(path, True) if n.startswith("wsi_gradcam.")}
        for module, path in modules().items()
        if module
    }
    while free := {module for module, needs in graph.items() if not needs & graph.keys() - {module}}:
        graph = {module: needs for module, needs in graph.items() if module not in free}
    assert not graph


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        ("cachetools", {"io"}),
        ("dask", {"executors", "results"}),
        ("distributed", {"executors"}),
        ("jinja2", {"pages"}),
        ("matplotlib", {"results", "export", "audit"}),
        ("obstore", {"io"}),
        ("openslide", {"slides"}),
        ("rich", {"cli"}),
        ("shapely", {"export"}),
        ("sklearn", {"evidence"}),
        ("starlette", {"viewer"}),
        ("uvicorn", {"viewer"}),
        ("yaozarrs", {"results"}),
        ("zarr", {"io", "slides", "results", "export"}),
    ],
)
def test_a_library_is_known_in_few_rooms(library: str, rooms: set[str]) -> None:
    users = {room_of(m) for m, p in modules().items() if any(n.partition(".")[0] == library for n in imports_of(p))}
    assert users == rooms


@pytest.mark.parametrize("module", ["geometry", "errors", "io.urls"])
def test_the_ground_needs_the_standard_library_only(module: str) -> None:
    tops = {name.partition(".")[0] for name in imports_of(modules()[module], True)} - {"__future__"}
    assert tops <= sys.stdlib_module_names


def test_the_package_is_imported_without_anything_heavy() -> None:
    assert python(f"import sys, wsi_gradcam; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


@pytest.mark.parametrize(
    "module",
    [
        "api",
        "cli.main",
        "cli.output",
        "run.settings",
        "executors.dask",
        "slides",
        "results.validation",
        "export.shapes",
        "viewer",
    ],
)
def test_modules_of_the_client_never_load_torch(module: str) -> None:
    assert python(f"import sys, wsi_gradcam.{module}; print('torch' in sys.modules)") == "False"


def test_public_names_are_what_they_say() -> None:
    code = "import wsi_gradcam as w; print(*(getattr(w, n).__name__ for n in sorted(w.__all__) if n[0] != '_'))"
    assert python(code) == (
        "GradCAM ModelSpec Settings audit_bags audit_images audit_run encode evidence_run explain load_model model_of "
        "open_result open_slide progress validate write_card"
    )
    assert python("import wsi_gradcam as w\ntry: w.nonsense\nexcept AttributeError as e: print(e)") == (
        "module 'wsi_gradcam' has no attribute 'nonsense'"
    )


def test_help_answers_at_once() -> None:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run(
            [str(Path(sys.executable).parent / "wsi-gradcam"), "--help"], capture_output=True, text=True, check=True
        )
        times.append(time.perf_counter() - started)
    assert statistics.median(times) < 0.5
    assert all(name in done.stdout for name in ("demo", "explain", "validate", "info"))


def test_a_client_of_workers_never_loads_torch(tmp_path: Path) -> None:
    """The process that hands out tasks stays small, and works where torch does not."""
    write_marker_slide(tmp_path / "a.tif", 130, 130, mpp=0.25, markers=[], marker_px=16)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from tests.runs import SMALL, toy_spec\n"
        "from wsi_gradcam.api import explain\n"
        "if __name__ == '__main__':\n"
        f"    outcome = explain({str(tmp_path / 'a.tif')!r}, toy_spec('pooled_linear'), {str(tmp_path / 'out')!r},\n"
        f"                      workers=1, **SMALL)\n"
        "    print([r.status for r in outcome.records], 'torch' in sys.modules)\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("['ok'] False\n", "")
    assert (tmp_path / "out" / "a.tif" / "overview.png").exists()
