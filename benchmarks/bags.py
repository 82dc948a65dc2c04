"""Speed and memory of explaining bags of patches: `python -m benchmarks.bags [speed|pixels|memory]`.

Speed: seconds for 10,000 patches x 1,024 features with a CLAM of the usual size, for each method alone, and the ratio
of its CPU time to that of one forward and backward pass of the whole bag through the same network, both taking turns.
Pixels: CPU time of explaining patches down to the pixel for coefficients of the bag (the second pass, Grad-CAM at the
last layer), by number of targets, over that of their features alone (a forward pass), by one engine and in turns.
Memory: by how much the process grows at its peak, by number of patches with 1,536 features in float16, which are read
from a memory-mapped file.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from wsi_gradcam.cam.explainer import Explainer, Request
from wsi_gradcam.cam.targets import Target
from wsi_gradcam.mil.attribution import explain_bag
from wsi_gradcam.mil.networks import AttentionPool, Mlp
from wsi_gradcam.models.load import load_model
from wsi_gradcam.models.spec import RANDOM, ModelSpec

METHODS = ("attention", "gradient_x_input", "lrp", "single", "one_removed", "shapley", "integrated_gradients")
COUNTS = (1_000, 10_000, 50_000, 100_000, 200_000)
LIMIT_BYTES = 3 << 29  # 1.5 GiB


def clam(features: int) -> AttentionPool:
    """Return a CLAM_SB of the usual size, untrained: 512 values, 256 hidden numbers of gated attention, two classes."""
    torch.manual_seed(0)
    gate = nn.Linear(512, 256), nn.Linear(512, 256), nn.Linear(256, 1)
    network = AttentionPool(Mlp([nn.Linear(features, 512)], True), *gate, Mlp([nn.Linear(512, 2)], False))
    return network.eval().requires_grad_(False)


def seconds(run: Callable[[], object]) -> float:
    """Return the CPU time of a call, over all threads."""
    started = time.process_time()
    run()
    return time.process_time() - started


def speed(count: int = 10_000, width: int = 1024, rounds: int = 3) -> dict[str, tuple[float, float, float]]:
    """Return for each method wall-clock seconds, CPU seconds, and the ratio to a bare forward and backward pass."""
    network = clam(width)
    features = np.random.default_rng(0).normal(size=(count, width)).astype(np.float16)
    bag = torch.from_numpy(features.astype(np.float32))

    def bare() -> None:
        given = bag.clone().requires_grad_()
        network(given).logits[1].backward()

    found = {}
    for method in METHODS:
        clock, ours, plain = [], [], []
        for _ in range(rounds if method != "integrated_gradients" else 1):  # which takes minutes
            plain.append(seconds(bare))
            started = time.perf_counter()
            ours.append(seconds(partial(explain_bag, network, features, [Target("1", 1)], [method])))
            clock.append(time.perf_counter() - started)
        found[method] = median(clock), median(ours), median(ours) / median(plain)
    return found


def pixels(name: str, rounds: int = 7, count: int = 16) -> list[float]:
    """Return the CPU time of the second pass over that of a forward pass, for one target and for four."""
    spec = ModelSpec(name=name, source=f"timm:{name}", weights=RANDOM, patch_px=(224, 224), mpp=0.5).as_encoder()
    explainer = Explainer.examine(load_model(spec), Request(batch_size=count), lambda _: None)
    random = np.random.default_rng(0)
    rgb = random.integers(0, 256, (count, 224, 224, 3), np.uint8)
    width = explainer.features(rgb).shape[1]
    sides: list[Callable[[], object]] = [partial(explainer.features, rgb)]
    for targets in (1, 4):
        coefficients = random.normal(size=(count, targets, width)).astype(np.float32)
        sides.append(partial(_pass, explainer, rgb, coefficients))
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, found in zip(sides, times, strict=True):
            found.append(seconds(side))
    forward, *passes = (median(found[1:]) for found in times)  # the first call sets things up
    return [one / forward for one in passes]


def _pass(explainer: Explainer, rgb: NDArray[np.uint8], coefficients: NDArray[np.float32]) -> None:
    explainer.begin_weighed(rgb, coefficients, ["gradcam"])()


def grown(count: int, width: int = 1536) -> int:
    """Return the most bytes by which the process has grown while explaining a bag; to be called once per process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        stored = np.lib.format.open_memmap(path, "w+", np.float16, (count, width))
        random = np.random.default_rng(0)
        for start in range(0, count, 10_000):
            part = stored[start : start + 10_000]
            part[:] = random.normal(size=part.shape)
        del stored, part
        features = np.load(path, mmap_mode="r")
        network = clam(width)
        explain_bag(network, features[:100], [Target("1", 1)], ["gradient_x_input"])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kept: list[int] = []

        def take(method: str, start: int, block: NDArray[np.floating]) -> None:
            kept.append(len(block))

        explain_bag(
            network,
            features,
            [Target("1", 1)],
            ["attention", "gradient_x_input", "lrp", "single", "one_removed", "shapley"],
            coefficients=take,
        )
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def main(wanted: str = "") -> None:
    """Print the tables, or by how much one process has grown."""
    if wanted.isdecimal():
        print(grown(int(wanted)))
        return
    if wanted in ("", "speed"):
        print("method                  s   CPU s   of forward + backward")
        for method, (clock, cpu, ratio) in speed().items():
            print(f"{method:20} {clock:5.2f}   {cpu:5.2f}   {ratio:5.2f}")
    if wanted in ("", "pixels"):
        print("encoder              second pass over forward: 1 target   4 targets")
        for name in ("resnet18", "resnet50", "vit_small_patch16_224"):
            print(f"{name:36} {'   '.join(f'{ratio:13.3f}' for ratio in pixels(name))}")
    if wanted in ("", "memory"):
        print("patches   MiB more")
        for count in COUNTS:
            command = [sys.executable, "-m", "benchmarks.bags", str(count)]
            bytes_more = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"{count:7,}   {bytes_more / 2**20:8.0f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
