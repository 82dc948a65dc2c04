"""What only a GPU can show, in one command of under ten minutes; a line of JSON for each finding as it comes.

In this order, so that anything cut off by `--seconds` matters least:

1. `machine`: device, driver, versions, flags.
2. `fidelity`: maps and logits in IEEE float32 against the CPU's, how far TF32, bfloat16 and float16 are off, on eager,
   recorded (CUDA graphs) and compiled trunks, whether the same batch gives the same bytes again (`repeats`), and in
   another order (`order`).
3. `rate`: explained patches/s at several batch sizes, beside the forward pass alone, pytorch-grad-cam and captum.
4. `copy`: host to device, pageable and pinned.
5. `run`: `explain` of a slide on the CPU and on the device: time, and the likeness of what is stored.
6. `profile`: kernels, launches, synchronisations and idle time of a batch, with a table beside it.

    python benchmarks/gpu.py --device cuda --out DIR --seconds 540
    python benchmarks/gpu.py --device cpu --out DIR --quick       # does it run?
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from skimage.data import immunohistochemistry
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from wsi_gradcam.api import explain
from wsi_gradcam.cam.auto import fidelity, make_program
from wsi_gradcam.cam.engine import Explained, explain_batch
from wsi_gradcam.cam.explainer import locate_layers
from wsi_gradcam.cam.facts import Layer
from wsi_gradcam.cam.program import EagerProgram, Program
from wsi_gradcam.cam.targets import PREDICTED, Target
from wsi_gradcam.cam.trunks import exact
from wsi_gradcam.demo.slide import write_slide
from wsi_gradcam.io.paths import storage_path
from wsi_gradcam.results.patch_store import PatchStore

METHODS = ("gradcam", "hirescam", "layercam", "xgradcam", "eigencam")
CLASSES = [Target("0", 0), Target("1", 1)]
MEASURED = ("torch", "torchvision", "timm", "grad-cam", "captum", "triton")
NAMES = {"resnet50": "layer4", "vit_large_patch16_224": "blocks.22", "convnext_tiny": "stages"}
QUICK = {"resnet18": "layer4"}
ROUNDS = 3
FIRST_BATCH, BATCHES = 128, (128, 32, 256)
LEFT_S = 20.0  # with less, nothing is worth starting
KEPT_S = 150.0  # for what comes after the rates


@dataclass
class Net:
    """A network with random weights on the device, and the same on the CPU for reference."""

    name: str
    here: nn.Module
    there: nn.Module
    layers: tuple[Layer, ...]
    side: int


@dataclass
class Bench:
    """The device, the remaining time, and where findings go."""

    device: torch.device
    out: Path
    seconds: float
    quick: bool
    began: float = field(default_factory=time.perf_counter)

    @property
    def left_s(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def tell(self, kind: str, **values: Any) -> None:
        line = json.dumps({"kind": kind, "at_s": round(time.perf_counter() - self.began, 1), **values})
        print(line, flush=True)
        with (self.out / "gpu.jsonl").open("a", encoding="utf-8") as file:
            print(line, file=file, flush=True)

    def section(self, kind: str, run: Callable[[], None], **about: Any) -> None:
        """Run a part; if there is no time for it, or it fails, the others continue."""
        least_s = 0.0 if self.quick else KEPT_S if kind == "rate" else LEFT_S
        if self.left_s < least_s:
            self.tell("skipped", part=kind, **about)
            return
        try:
            run()
        except Exception as error:
            self.tell(
                "failed", part=kind, error=repr(error)[:300], where=traceback.format_exc(limit=-3)[-600:], **about
            )

    def wait(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def rate(self, run: Callable[[], int]) -> float:
        """Return what `run` counts per second, as the median of a few rounds after two for setting things up."""
        run()
        run()
        self.wait()
        least_s = 0.02 if self.quick else 0.7
        found = []
        for _ in range(ROUNDS):
            count, started = 0, time.perf_counter()
            while time.perf_counter() - started < least_s:
                count += run()
            self.wait()
            found.append(count / (time.perf_counter() - started))
        return round(statistics.median(found), 1)


def tell_machine(bench: Bench) -> None:
    device = {}
    if bench.on_cuda:
        about = torch.cuda.get_device_properties(bench.device)
        device = {
            "name": about.name,
            "gib": round(about.total_memory / 2**30, 1),
            "capability": [about.major, about.minor],
        }
    found = {}
    for name in MEASURED:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    flags = {"cudnn_tf32": torch.backends.cudnn.allow_tf32, "matmul_tf32": torch.backends.cuda.matmul.allow_tf32}
    cuda = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
    bench.tell("machine", device=device or str(bench.device), versions=found, default_flags=flags, **cuda)


def make_net(bench: Bench, name: str, layer: str) -> Net:
    torch.manual_seed(0)
    here = timm.create_model(name, num_classes=10).eval().requires_grad_(False)
    side = 64 if bench.quick else 224
    _, layers, _ = locate_layers(here, layer, torch.randn(2, 3, side, side))
    return Net(name, here, copy.deepcopy(here).to(bench.device), layers, side)


def add_net(bench: Bench, nets: list[Net], name: str, layer: str) -> None:
    nets.append(make_net(bench, name, layer))


def off(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    found, expected = found.cpu(), expected.cpu()
    return float((found - expected).abs().max() / expected.abs().max())


def same(a: Explained, b: Explained) -> bool:
    """Return whether both are equal down to the last bit."""
    return torch.equal(a.logits, b.logits) and all(torch.equal(a.cams[m], b.cams[m]) for m in a.cams)


def tell_fidelity(bench: Bench, net: Net) -> None:
    images = torch.randn(4 if bench.quick else 16, 3, net.side, net.side)
    expected = explain_batch(EagerProgram(net.here, net.layers), images, CLASSES, METHODS)
    there = images.to(bench.device)
    programs = [("eager", "float32"), ("eager", "bfloat16"), ("eager", "float16")]
    if bench.on_cuda:
        programs[1:1] = [("eager", "tf32"), ("cudagraphs", "float32"), ("cudagraphs", "bfloat16")]
        programs += [("compile", "float32"), ("compile", "tf32"), ("compile", "bfloat16")]
    for engine, precision in programs:
        bench.section(
            "fidelity",
            partial(tell_program, bench, net, there, expected, engine, precision),
            net=net.name,
            engine=engine,
            precision=precision,
        )


def tell_program(bench: Bench, net: Net, images: Tensor, expected: Explained, engine: str, precision: str) -> None:
    started = time.perf_counter()
    program = make_program(net.there, net.layers, engine, precision, images)
    made_s = time.perf_counter() - started
    found, again = (explain_batch(program, images, CLASSES, METHODS) for _ in range(2))
    moved = explain_batch(program, images.roll(1, 0), CLASSES, METHODS)
    alike = fidelity(found.cams["gradcam"].cpu(), expected.cams["gradcam"])
    bench.tell(
        "fidelity",
        net=net.name,
        engine=engine,
        precision=precision,
        logits=off(found.logits, expected.logits),
        maps={m: off(found.cams[m], expected.cams[m]) for m in METHODS},
        **asdict(alike),
        repeats=same(found, again),
        order=off(moved.cams["gradcam"].roll(-1, 0), found.cams["gradcam"]),
        made_s=round(made_s, 2),
    )


def ours(program: Program, images: Tensor) -> int:
    return len(explain_batch(program, images, [Target(PREDICTED)]).logits)


def sides(bench: Bench, net: Net, images: Tensor) -> Iterator[tuple[str, Callable[[], int]]]:
    """Yield the sides to be timed; a rival that is not installed, or cannot be set up, is reported and left out."""
    programs = [("eager", "float32"), ("eager", "bfloat16"), ("eager", "float16")]
    if bench.on_cuda and len(images) == FIRST_BATCH:  # it compiles for a minute
        programs += [("eager", "tf32"), ("cudagraphs", "tf32"), ("cudagraphs", "bfloat16")]
        programs += [("compile", "tf32"), ("compile", "bfloat16")]
    for engine, precision in programs:
        try:
            program = make_program(net.there, net.layers, engine, precision, images)
        except Exception as error:
            bench.tell("left out", net=net.name, side=f"ours {engine} {precision}", error=repr(error)[:200])
            continue
        yield f"ours {engine} {precision}", partial(ours, program, images)
    low = copy.deepcopy(net.there).to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    low_images = images.to(torch.bfloat16, memory_format=torch.channels_last)
    for label, module, batch in (("float32", net.there, images), ("bfloat16", low, low_images)):
        yield f"forward {label}", partial(forward, module, batch)
    for make in (grad_cam, captum):
        try:
            yield make(net, images)
        except Exception as error:
            bench.tell("left out", net=net.name, side=make.__name__, error=repr(error)[:200])


@torch.inference_mode()
def forward(module: nn.Module, images: Tensor) -> int:
    with exact(images.device):
        return len(module(images))


def grad_cam(net: Net, images: Tensor) -> tuple[str, Callable[[], int]]:
    own = copy.deepcopy(net.there).requires_grad_(True)  # it wants parameters with gradients, and leaves hooks
    layer, layout = own.get_submodule(net.layers[0].name), net.layers[0].layout
    reshape = None if layout.axes == "bkhw" else layout.to_map
    rival = importlib.import_module("pytorch_grad_cam").GradCAM(own, [layer], reshape_transform=reshape)

    def run() -> int:
        with exact(images.device):
            return len(rival(images, targets=None))

    return "pytorch-grad-cam float32", run


def captum(net: Net, images: Tensor) -> tuple[str, Callable[[], int]]:
    if net.layers[0].layout.axes == "bnk":
        raise ValueError("captum's Grad-CAM knows no tokens")
    own = copy.deepcopy(net.there).requires_grad_(True)
    rival = importlib.import_module("captum.attr").LayerGradCam(own, own.get_submodule(net.layers[0].name))

    def run() -> int:
        with exact(images.device):
            with torch.inference_mode():
                classes = own(images).argmax(1).tolist()
            return len(rival.attribute(images, target=classes))

    return "captum float32", run


def tell_rates(bench: Bench, net: Net, batch: int) -> None:
    images = torch.randn(batch, 3, net.side, net.side, device=bench.device)
    for label, run in sides(bench, net, images):
        bench.section(
            "rate",
            partial(tell_rate, bench, net, batch, label, run),
            net=net.name,
            batch=batch,
            side=label,
        )


def tell_rate(bench: Bench, net: Net, batch: int, label: str, run: Callable[[], int]) -> None:
    if bench.on_cuda:
        torch.cuda.reset_peak_memory_stats(bench.device)
    rate = bench.rate(run)
    peak = round(torch.cuda.max_memory_allocated(bench.device) / 2**30, 2) if bench.on_cuda else None
    bench.tell("rate", net=net.name, batch=batch, side=label, patches_per_s=rate, peak_gib=peak)


def copied(bench: Bench, source: Tensor, at_once: bool) -> int:
    return len(source.to(bench.device, non_blocking=at_once))


def tell_copies(bench: Bench, side: int) -> None:
    """Host to device: pageable memory, and pinned without waiting."""
    rgb = torch.randint(0, 256, (4 if bench.quick else 128, side, side, 3), dtype=torch.uint8)
    sources = {"pageable": (rgb, False)} | ({"pinned": (rgb.pin_memory(), True)} if bench.on_cuda else {})
    for label, (source, at_once) in sources.items():
        rate = bench.rate(partial(copied, bench, source, at_once))
        bench.tell("copy", memory=label, gb_per_s=round(rate * side * side * 3 / 1e9, 2), patches_per_s=rate)


def tell_run(bench: Bench) -> None:
    """`explain` on the CPU and on the device: seconds, and how alike what they store is."""
    side = 1024 if bench.quick else 12288
    tile = immunohistochemistry()
    repeats = -(-side // tile.shape[0])
    path = bench.out / "slide.tif"
    write_slide(path, np.tile(tile, (repeats, repeats, 1))[:side, :side], mpp=0.5)
    common: dict[str, Any] = {"min_tissue": 0.0, "engine": "eager", "precision": "float32"}
    runs: Mapping[str, dict[str, Any]] = {"cpu": {"device": "cpu"}, "device": {"device": str(bench.device)}}
    stored: dict[str, Tensor] = {}
    for label, settings in runs.items():
        started = time.perf_counter()
        outcome = explain(path, "oral-tumour", bench.out / label, **common, **settings)
        seconds = time.perf_counter() - started
        patches = sum(record.patches for record in outcome.records)
        bench.tell(
            "run", side=label, seconds=round(seconds, 1), patches=patches, patches_per_s=round(patches / seconds, 1)
        )
        store = PatchStore(storage_path(bench.out / label / path.name / "cams.zarr"))
        stored[label] = torch.from_numpy(store.cams(0, patches, 0))[:, None]
    alike = fidelity(stored["device"], stored["cpu"])
    equal = torch.equal(stored["device"], stored["cpu"])
    bench.tell("run", side="both", off=off(stored["device"], stored["cpu"]), bytes_equal=equal, **asdict(alike))


def tell_profile(bench: Bench, net: Net) -> None:
    from torch.profiler import ProfilerActivity, profile

    images = torch.randn(4 if bench.quick else 128, 3, net.side, net.side, device=bench.device)
    program = make_program(net.there, net.layers, "eager", "bfloat16", images)
    ours(program, images)
    bench.wait()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_cuda else [])]
    with profile(activities=kinds) as found:
        started = time.perf_counter()
        for _ in range(ROUNDS):
            ours(program, images)
        bench.wait()
        wall_s = time.perf_counter() - started
    events: Sequence[Any] = found.events() or []
    kernels = [event for event in events if str(event.device_type).endswith("CUDA")]

    def calls(*names: str) -> float:
        return sum(event.name in names for event in events) / ROUNDS

    busy_s = sum(event.device_time for event in kernels) / 1e6
    bench.tell(
        "profile",
        net=net.name,
        batch=len(images),
        wall_ms=round(1e3 * wall_s / ROUNDS, 2),
        kernels=len(kernels) / ROUNDS,
        idle=round(1 - busy_s / wall_s, 3) if kernels else None,
        synchronisations=calls("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
        copies=calls("cudaMemcpyAsync"),
        launches=calls("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel"),
    )
    order = "self_cuda_time_total" if bench.on_cuda else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=order, row_limit=25)
    (bench.out / f"profile-{net.name}.txt").write_text(table, encoding="utf-8")


def run(bench: Bench) -> None:
    bench.section("machine", lambda: tell_machine(bench))
    nets: list[Net] = []
    for name, layer in (QUICK if bench.quick else NAMES).items():
        bench.section("net", partial(add_net, bench, nets, name, layer), net=name)
    for net in nets:
        bench.section("fidelity", partial(tell_fidelity, bench, net), net=net.name)
    for batch in (4,) if bench.quick else BATCHES:
        for net in nets:
            bench.section("rate", partial(tell_rates, bench, net, batch), net=net.name, batch=batch)
    bench.section("copy", lambda: tell_copies(bench, 64 if bench.quick else 224))
    bench.section("run", lambda: tell_run(bench))
    for net in nets:
        bench.section("profile", partial(tell_profile, bench, net), net=net.name)
    bench.tell("done", seconds=round(time.perf_counter() - bench.began, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (default cuda)")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for gpu.jsonl and tables; what it had of those is replaced"
    )
    parser.add_argument("--seconds", type=float, default=540.0, help="begin nothing after so long (default 540)")
    parser.add_argument("--quick", action="store_true", help="a small network, few patches: does it run?")
    arguments = parser.parse_args()
    if arguments.quick:
        torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gpu.jsonl").unlink(missing_ok=True)
    run(Bench(torch.device(arguments.device), arguments.out, arguments.seconds, arguments.quick))


if __name__ == "__main__":
    main()
