"""Changes documents that strangers write, in many ways, and reads them: one clear line, soon, in little memory.

    python -m tests.fuzz --kind zarr [--cases 10000] [--seed 0] [--only NUMBER]

Kinds: metadata of OME-Zarr, GeoJSON, XML of ImageScope and of ASAP, configurations of WSInfer and of Hugging Face,
result folders. `--kind all` takes each in turn.
"""

from __future__ import annotations

import atexit
import copy
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.bombs_zarr import Image, codec_of
from tests.runs import ROOT
from wsi_gradcam.errors import WsiGradcamError

CASE_S, CASE_BYTES = 5, 1 << 30  # seconds of all threads
WALL_S = 60  # on a machine that does much else
AT_ONCE = 250
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # networks this small wait for one another's threads
MAX_LINE = 4000  # characters of an error

Random = np.random.Generator
Read = Callable[[Path], object]

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 255, 65_536, 1 << 31, 1 << 63, 10**30, -(1 << 40), 0.5, -0.0, 1e-300, 1e300,
    float("nan"), float("inf"), "", "0", "a", "../..", "/etc/passwd", "\x00", "\x1b[2J", "é" * 40, "x" * 5000, [], {},
    [[]], [0], [1, 2], ["a"], {"a": 1}, [None] * 40, [[0, 0], [1e9, 0], [0, 1e9]], "s3://a/b", "http://169.254.169.254/",
)  # fmt: skip


def places_of(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of all values in a document."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        container = waiting.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                waiting.append(container[key])
    return found


def change_values(value: Any, rng: Random) -> Any:
    """Return a document in which some values are others, are lost, doubled, or those of another key."""
    changed = copy.deepcopy(value)
    for _ in range(int(rng.integers(1, 4))):
        places = places_of(changed)
        if not places:
            return changed
        container, key = places[int(rng.integers(len(places)))]
        how = int(rng.integers(6))
        if how <= 2:
            container[key] = copy.deepcopy(ODD[int(rng.integers(len(ODD)))])
        elif how == 3:
            del container[key]
        elif how == 4:
            other, name = places[int(rng.integers(len(places)))]
            container[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else other[name % len(other)])
        elif isinstance(container, list):
            container *= int(rng.integers(2, 60))
        else:
            for _ in range(int(rng.integers(1, 200))):
                container[key] = [container[key]]
    return changed


def change_text(text: str, rng: Random) -> str:
    """Return a text with some characters changed, cut, doubled, or replaced by numbers."""
    for _ in range(int(rng.integers(1, 5))):
        at, length = int(rng.integers(len(text) + 1)), int(rng.integers(1, 40))
        part = text[at : at + length]
        odd = str(ODD[int(rng.integers(len(ODD)))])[:200]
        choices = ("", part * int(rng.integers(2, 50)), odd, part[::-1], "<", '"', "&", "]", "\x00", "<!DOCTYPE a>")
        text = text[:at] + choices[int(rng.integers(len(choices)))] + text[at + length :]
    return text


def change_json(path: Path, rng: Random) -> None:
    """Change a JSON file: mostly its values, now and then its text."""
    text = path.read_text(encoding="utf-8")
    is_whole = bool(rng.integers(5))
    text = json.dumps(change_values(json.loads(text), rng)) if is_whole else change_text(text, rng)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


GEOJSON = {
    "type": "FeatureCollection",
    "features": [
        {
            "type": "Feature",
            "id": "a",
            "geometry": {
                "type": "Polygon",
                "coordinates": [[[0, 0], [90, 0], [90, 90], [0, 0]], [[9, 9], [20, 9], [20, 20], [9, 9]]],
            },
            "properties": {"objectType": "annotation", "classification": {"name": "tumour", "color": [1, 2, 3]}},
        },
        {
            "type": "Feature",
            "geometry": {
                "type": "GeometryCollection",
                "geometries": [
                    {"type": "MultiPolygon", "coordinates": [[[[0, 0], [5, 0], [5, 5], [0, 0]]]]},
                    {"type": "Point", "coordinates": [4, 4]},
                ],
            },
            "properties": {"classification": {"names": ["a", "b"]}, "name": "c"},
        },
    ],
}
IMAGESCOPE = """<?xml version="1.0"?><Annotations MicronsPerPixel="0.5"><Annotation Id="1" Name="" LineColor="65280">
<Attributes><Attribute Name="Description" Value="tumour"/></Attributes><Regions><RegionAttributeHeaders/>
<Region Id="1" Type="0" Text="a" NegativeROA="0"><Vertices><Vertex X="0" Y="0" Z="0"/><Vertex X="90" Y="0"/>
<Vertex X="90" Y="90"/></Vertices></Region><Region Id="2" Type="1" NegativeROA="1"><Vertices><Vertex X="2" Y="2"/>
<Vertex X="20" Y="2"/><Vertex X="20" Y="20"/><Vertex X="2" Y="20"/></Vertices></Region>
<Region Id="3" Type="2"><Vertices><Vertex X="30" Y="30"/><Vertex X="60" Y="70"/></Vertices></Region></Regions>
</Annotation></Annotations>"""
ASAP = """<?xml version="1.0"?><ASAP_Annotations><Annotations><Annotation Name="a" Type="Polygon" PartOfGroup="tumour"
Color="#F4FA58"><Coordinates><Coordinate Order="0" X="0.5" Y="1"/><Coordinate Order="1" X="90" Y="1"/>
<Coordinate Order="2" X="90" Y="90"/></Coordinates></Annotation><Annotation Name="b" Type="Dot" PartOfGroup="None"
Color="#000000"><Coordinates><Coordinate Order="0" X="5" Y="5"/></Coordinates></Annotation></Annotations>
<AnnotationGroups><Group Name="tumour" PartOfGroup="None" Color="#64FE2E"><Attributes/></Group>
<Group Name="b" PartOfGroup="tumour" Color="#64FE2E"/></AnnotationGroups></ASAP_Annotations>"""
WSINFER = {
    "spec_version": "1.0",
    "num_classes": 2,
    "class_names": ["a", "b"],
    "patch_size_pixels": 64,
    "spacing_um_px": 0.5,
    "transform": [
        {"name": "Resize", "arguments": {"size": 64, "interpolation": 2, "antialias": True}},
        {"name": "ToTensor"},
        {"name": "Normalize", "arguments": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}},
    ],
}
TIMM = {
    "architecture": "test_resnet",
    "num_classes": 3,
    "num_features": 96,
    "global_pool": "avg",
    "label_names": ["a", "b", "c"],
    "model_args": {"in_chans": 3},
    "pretrained_cfg": {
        "input_size": [3, 64, 64],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
        "num_classes": 3,
        "pool_size": [2, 2],
    },
}


def make_zarr(folder: Path, rng: Random) -> Path:
    version = int(rng.integers(2, 4))
    image = Image(version, (3, 128, 128), (3, 64, 64), 200, codec_of("gzip", version), paths=("0", "1"))
    path = image.write(folder / "a.zarr")
    names = (".zattrs", ".zgroup", "0/.zarray", "1/.zarray") if version == 2 else ("zarr.json", "0/zarr.json")
    change_json(path / str(rng.choice(names)), rng)
    return path


def make_geojson(folder: Path, rng: Random) -> Path:
    path = folder / "a.geojson"
    path.write_text(json.dumps(GEOJSON))
    change_json(path, rng)
    return path


def make_xml(text: str) -> Callable[[Path, Random], Path]:
    """Return a maker of changed XML."""

    def make(folder: Path, rng: Random) -> Path:
        path = folder / "a.xml"
        path.write_text(change_text(text, rng), encoding="utf-8", errors="surrogateescape")
        return path

    return make


def make_model(
    values: dict[str, Any], weights: Callable[[], tuple[str, bytes]], change: bool = True
) -> Callable[[Path, Random], Path]:
    """Return a maker of folders with a changed config.json and weights that fit what it was."""

    def make(folder: Path, rng: Random) -> Path:
        path = folder / "config.json"
        path.write_text(json.dumps(values))
        if change:
            change_json(path, rng)
        name, data = weights()
        (folder / name).write_bytes(data)
        return folder

    return make


@cache
def scripted() -> tuple[str, bytes]:
    """A small network in TorchScript."""
    import torch

    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 5, 4),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 2),
    )
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(network.eval(), torch.zeros(1, 3, 64, 64)), buffer)  # type: ignore[no-untyped-call]
    return "torchscript_model.pt", buffer.getvalue()


@cache
def trained() -> tuple[str, bytes]:
    """The weights of timm's smallest network."""
    import timm
    from safetensors.torch import save

    return "model.safetensors", save(timm.create_model(str(TIMM["architecture"]), num_classes=3).state_dict())


@cache
def sound_results() -> Path:
    """Results to be copied, which go with the process."""
    from tests.made_results import Made, make, steps

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return make(folder / "out", {"a.svs": Made((640, 640), steps((40, 40)))})


def make_results(folder: Path, rng: Random) -> Path:
    out = Path(shutil.copytree(sound_results(), folder / "out"))
    files = sorted(path for path in out.rglob("*") if path.suffix in (".json", ".yaml", ".csv", ".jsonl", ".parquet"))
    path = files[int(rng.integers(len(files)))]
    if path.suffix == ".json":
        change_json(path, rng)
    elif path.suffix == ".parquet":
        data = bytearray(path.read_bytes())
        for at in rng.integers(0, len(data), 3):
            data[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
    else:
        path.write_text(change_text(path.read_text(), rng), encoding="utf-8", errors="surrogateescape")
    return out


def read_slide(path: Path) -> None:
    from wsi_gradcam.slides import open_slide, read_region, thumbnail

    slide = open_slide(path, 0.5)
    thumbnail(slide, 8.0, 64)
    read_region(slide, 0, 0, 64, 64, 0.5)
    slide.close()


def read_mask(path: Path) -> None:
    from wsi_gradcam.tissue.annotations.areas import rasterise
    from wsi_gradcam.tissue.annotations.regions import read_annotations

    rasterise(read_annotations(path).areas, (1000, 1000), (100, 100), str(path))


def read_wsinfer(path: Path) -> None:
    from wsi_gradcam.models.load import load_model

    load_model(f"wsinfer:{path}", trust_code=True)


def read_hf(path: Path) -> None:
    from wsi_gradcam.models.load import load_model

    load_model(f"hf:{path}")


def read_results(path: Path) -> None:
    from wsi_gradcam.geometry import Region
    from wsi_gradcam.results.run import open_result
    from wsi_gradcam.results.validation import validate

    validate(str(path))
    for slide in open_result(path):
        for channel in slide.channels:
            slide.read(channel, 0, Region(0, 0, *slide.levels[0]))
        len(slide.patches)


KINDS: dict[str, tuple[Callable[[Path, Random], Path], Read]] = {
    "zarr": (make_zarr, read_slide),
    "geojson": (make_geojson, read_mask),
    "imagescope": (make_xml(IMAGESCOPE), read_mask),
    "asap": (make_xml(ASAP), read_mask),
    "wsinfer": (make_model(WSINFER, scripted), read_wsinfer),
    "hf": (make_model(TIMM, trained), read_hf),
    "results": (make_results, read_results),
}


class SlowError(BaseException):
    """A case that does not end."""


def _stop(*_: object) -> None:
    raise SlowError(f"no end in {WALL_S} s")


def check(kind: str, number: int, seed: int) -> str:
    """What is wrong in how a case is dealt with; nothing where all is well."""
    make, read = KINDS[kind]
    folder = Path(tempfile.mkdtemp())
    try:
        path = make(folder, np.random.default_rng([seed, number]))
        started = time.process_time()
        signal.alarm(WALL_S)
        read(path)
    except WsiGradcamError as error:
        said = str(error)
        if len(said) > MAX_LINE:
            return f"an error of {len(said)} characters: {said[:200]}"
    except BaseException:
        return traceback.format_exc(limit=-4)
    finally:
        signal.alarm(0)
        shutil.rmtree(folder)
    seconds = time.process_time() - started
    return f"took {seconds:.1f} s" if seconds > CASE_S else ""


def warm_up(kind: str) -> None:
    """Import what reading a sound document needs, which takes its time."""
    sound = {"wsinfer": (WSINFER, scripted), "hf": (TIMM, trained)}
    if kind in sound:
        with tempfile.TemporaryDirectory() as folder:
            KINDS[kind][1](make_model(*sound[kind], change=False)(Path(folder), np.random.default_rng(0)))


def run_cases(kind: str, first: int, count: int, seed: int) -> None:
    """In a child: check cases, print what is wrong; the number of the case at work goes first."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    warm_up(kind)
    check(kind, first, seed)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + CASE_BYTES, used + CASE_BYTES))
    signal.signal(signal.SIGALRM, _stop)
    for number in range(first, first + count):
        print(f"case {number}", flush=True)
        if problem := check(kind, number, seed):
            print(f"WRONG {kind} {number}: {problem}", flush=True)


def fuzz(kind: str, cases: int, seed: int = 0, first: int = 0) -> list[str]:
    """What went wrong in that many cases, a line or a traceback each."""

    def command(number: int, count: int) -> list[str]:
        return ["tests.fuzz_documents", kind, str(number), str(count), str(seed)]

    return in_children(command, cases, first, f"{kind} ")


def in_children(command: Callable[[int, int], list[str]], cases: int, first: int, what: str) -> list[str]:
    """What went wrong in cases that processes of their own try, some at a time, each after one that ended it.

    `command` gives module and arguments for so many cases from a number on; what they print begins with "case NUMBER",
    and after "WRONG " says what is. `what` stands before the number of a case that ended its process.
    """
    problems: list[str] = []
    number, end = first, first + cases
    while number < end:
        count = min(AT_ONCE, end - number)
        run = [sys.executable, "-m", *command(number, count)]
        ended = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False, env=ONE_THREAD)
        chunks = ended.stdout.split("case ")[1:]
        problems += [chunk.partition("WRONG ")[2] for chunk in chunks if "WRONG " in chunk]
        done = int(chunks[-1].split()[0]) if chunks else number
        if ended.returncode:
            problems.append(f"{what}{done}: the process ended with {ended.returncode}: {ended.stderr[-300:]}")
        number = done + 1 if ended.returncode else number + count
    return problems


if __name__ == "__main__":
    run_cases(sys.argv[1], *map(int, sys.argv[2:5]))
