"""What importing costs, and which room may know which."""

from __future__ import annotations

import ast
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import ROOT
from tests.synthetic import write_marker_slide

PACKAGE = ROOT / "wsi_gradcam"
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

# From the ground up: a module may import from rooms of lower lines and from earlier ones on its own line.
ROOMS = """
errors  memory  urls  windows  object_stores  processes  ticking  durations
isolation  stopping
geometry
stain.density  stain.macenko  stain.reinhard  stain
slides.base  slides.tile_cache  slides.files  slides.remote  slides.remote_zarr
slides.openslide_reader  slides.picture_reader  slides.ome_zarr_reader
slides.colours  slides.jpeg  slides.tiff_levels  slides.tiff_check
slides.tiff_info  slides.tiff_reader  slides.tiff_vendor
slides.opening  slides.remote_opening  slides.resample  slides
patterns  slide_list  file_search  inputs
models  models.activation  models.staining  models.spec  models.zoo
config
quality  annotations  tissue  patches  reading  sampling
stores  stores.files  stores.place  stores.local_place
stores.buckets  stores.remote_zarr  stores.remote_place  stores.places
mask_picture
models.outputs  models.graph  models.transform  models.batches  models.pickles
models.sources  models.reproducible  models.load  models.live
cam  cam.names  cam.choice  cam.remembered  cam.targets  cam.probe  cam.score  cam.layout  cam.facts
cam.methods  cam.finer  cam.perturbation  cam.pixels  cam.probing
cam.tap  cam.guided  cam.trunks  cam.program  cam.engine  cam.layers  cam.batch  cam.auto  cam.examine
explainer  gradcam
stitch
audit
stores.layout  stores.groups  stores.manifest  stores.masks  stores.patch_store  stores.heatmap
plan
stores.run_files  stores.slide_record  stores.claims  stores.status_file
table  overview  finish
audit.measured  audit.schema  audit.plan  audit.folder  audit.annotated  audit.spreading
stages.context  stages.stitching  stages.planning  stages.explaining
audit.patch_data  audit.asked  audit.asking_maps  audit.asking_model  audit.piece
stages.auditing  stages
workflow
listening  progress  run_log  run_facts  page  run_style  run_report  journal  failures
result.channels  result.notebook  result.lazy  result.slide  result.sketch  result.display  result.run  result
export.files  export.colours  export.job  export.outlines  export.regions
export.ome_tiff  export.ome_zarr_04  export.tiff  export.deepzoom  export.png  export.geojson  export.qupath  export
napari_reader
validation
audit.sample  audit.judged  audit.gathered  audit.judging_faithfulness  audit.judging_maps  audit.judging_model
audit.metrics  audit.reopening  audit.comparing
executors  executors.retries  executors.serial  executors.dask
api
audit.words  audit.figures  audit.pictures  audit.report_style  audit.report_numbers  audit.report_figures
audit.report_parts  audit.report  audit.reporting
audit.running  audit.images  audit.saying
terminal  report  status
doctor
demo
viewer
cli
"""
ORDER = {name: number for number, name in enumerate(ROOMS.split())}


@functools.cache
def modules() -> dict[str, Path]:
    """All modules of the package by name without "wsi_gradcam."; the package itself is ""."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def imported(path: Path) -> tuple[str, ...]:
    """Names of the modules that a file imports anywhere, also in functions and for type checking."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for name in node.names:  # `from package import module` imports the module
                inner = f"{node.module}.{name.name}"
                yield inner if inner.removeprefix("wsi_gradcam.") in modules() else node.module


def room(module: str) -> str:
    """The name in ROOMS that a module belongs to: its own, or the one of the package it is in."""
    while module not in ORDER and "." in module:
        module = module.rpartition(".")[0]
    return module


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


@pytest.mark.parametrize("module", sorted(set(modules()) - {""}))
def test_imports_run_downwards(module: str) -> None:
    assert room(module) in ORDER, f"{module} is a new room: give it a place in ROOMS"
    for name in imported(modules()[module]):
        if name == "wsi_gradcam" or name.startswith("wsi_gradcam."):
            other = name.removeprefix("wsi_gradcam").removeprefix(".")
            if other == "" or room(other) == room(module):
                continue
            assert ORDER[room(other)] < ORDER[room(module)], f"{module} imports {other}, which stands above it"


def test_there_are_no_cycles() -> None:
    """Also inside a room, where the order is not stated."""
    graph = {
        module: {n.removeprefix("wsi_gradcam.") for n in imported(path) if n.startswith("wsi_gradcam.")}
        for module, path in modules().items()
        if module
    }
    while free := {module for module, needs in graph.items() if not needs & graph.keys() - {module}}:
        graph = {module: needs for module, needs in graph.items() if module not in free}
    assert not graph


def test_every_room_exists() -> None:
    assert set(ORDER) <= set(modules())


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("distributed", {"executors.dask"}),
        ("dask", {"executors.dask", "result.lazy"}),
        ("openslide", {"slides.openslide_reader"}),
        ("rich", {"report", "terminal"}),
        ("yaozarrs", {"validation"}),
        (
            "zarr",
            {
                "stores.heatmap",
                "stores.patch_store",
                "stores.place",
                "stores.local_place",
                "stores.remote_zarr",
                "stores.groups",
                "slides.ome_zarr_reader",
                "slides.remote_zarr",
                "export.ome_zarr_04",
            },
        ),
        ("obstore", {"object_stores"}),
        ("starlette", {"viewer"}),
        ("uvicorn", {"viewer"}),
        ("matplotlib", {"overview", "export.colours", "export.png", "audit.figures", "audit.pictures"}),
        ("shapely", {"export.outlines", "export.regions", "export.geojson"}),
    ],
)
def test_a_library_is_known_in_one_place(library: str, allowed: set[str]) -> None:
    users = {room(m) for m, path in modules().items() if any(n.partition(".")[0] == library for n in imported(path))}
    assert users
    assert users <= allowed


@pytest.mark.parametrize("module", ["geometry", "errors", "urls"])
def test_the_ground_needs_the_standard_library_only(module: str) -> None:
    tops = {name.partition(".")[0] for name in imported(modules()[module])} - {"__future__"}
    assert tops <= sys.stdlib_module_names


def test_the_package_is_imported_without_anything_heavy() -> None:
    assert python(f"import sys, wsi_gradcam; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


@pytest.mark.parametrize(
    "module",
    ["api", "cli", "config", "report", "executors.dask", "slides", "validation", "export.qupath", "napari_reader"],
)
def test_modules_of_the_client_never_load_torch(module: str) -> None:
    assert python(f"import sys, wsi_gradcam.{module}; print('torch' in sys.modules)") == "False"


def test_public_names_are_what_they_say() -> None:
    code = "import wsi_gradcam as w; print(*(getattr(w, n).__name__ for n in sorted(w.__all__) if n[0] != '_'))"
    assert python(code) == (
        "GradCAM ModelSpec Settings audit_images audit_run explain load_model model_of open_result open_slide validate"
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
