"""The cost of the audit on top of the forward passes it needs.

Deletion and insertion for a patch in 28 steps need 56 answers from the model: 27 each way, for the whole patch, and for
the completely replaced one. This is compared with the same number of bare forward passes, in the same batches, of
prepared pictures. `ratios` has `deletion_insertion_over_forwards`: seconds of the former over those of the latter, the
median of rounds in which the two take turns.

    python benchmarks/audit.py [--rounds N] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from wsi_gradcam.audit.measures.removal import STEPS, blurred, removal_curves, replace_by
from wsi_gradcam.audit.measures.subject import Subject, control_maps
from wsi_gradcam.cam.targets import PREDICTED, Target
from wsi_gradcam.models.load import load_model
from wsi_gradcam.models.spec import ModelSpec

ANSWERS = 2 * (STEPS - 1) + 2  # of a patch
TARGET = Target(PREDICTED)


def subject_of(side: int, batch_size: int) -> Subject:
    """ResNet-18 with random weights."""
    spec = ModelSpec(name="resnet18", source="torchvision:resnet18", weights="random", patch_px=side)
    return Subject.of(load_model(spec), batch_size=batch_size)


def noise(count: int, side: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Patches of noise as smooth as tissue."""
    coarse = torch.rand(count, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear", align_corners=False)
    return (smooth * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def deletion_insertion(subject: Subject, images: Tensor, maps: Tensor) -> None:
    """Both curves of one map of every patch, and the outputs at their ends."""
    aim = subject.aim(images, TARGET)
    removal_curves(subject, images, aim, {"map": maps}, replace_by(images, blurred(images)))


def forwards(subject: Subject, images: Tensor) -> None:
    """The same number of bare forward passes, in the same batches."""
    left = ANSWERS * len(images)
    batch = images.repeat(-(-subject.batch_size // len(images)), 1, 1, 1)[: subject.batch_size].contiguous()
    while left > 0:
        subject.program.predict(batch[:left])
        left -= len(batch)


def seconds(run: Callable[[], None]) -> float:
    """Seconds that a run takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    subject = subject_of(arguments.side, arguments.batch_size)
    images = subject.images(noise(arguments.patches, arguments.side))
    aim = subject.aim(images, TARGET)
    maps = subject.maps(images, aim)
    sides = {
        "deletion_insertion": lambda: deletion_insertion(subject, images, maps),
        "forwards": lambda: forwards(subject, images),
    }
    found: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(arguments.rounds + 1):  # the first is for warming up
        for name in list(sides) if i % 2 == 0 else list(sides)[::-1]:
            found[name].append(seconds(sides[name]))
    times = {name: statistics.median(values[1:]) for name, values in found.items()}
    all_maps = {"map": maps} | control_maps(images, (maps.shape[1], maps.shape[2]), range(len(images)))
    with_controls = seconds(
        lambda: void(removal_curves(subject, images, aim, all_maps, replace_by(images, blurred(images))))
    )
    return {
        "ratios": {"deletion_insertion_over_forwards": times["deletion_insertion"] / times["forwards"]},
        "seconds_per_patch": {name: value / len(images) for name, value in times.items()},
        "minutes_per_1000_patches_with_controls": with_controls / len(images) * 1000 / 60,
        "settings": {
            "network": "resnet18",
            "side_px": arguments.side,
            "patches": len(images),
            "steps": STEPS,
            "batch_size": arguments.batch_size,
            "rounds": arguments.rounds,
            "torch_threads": torch.get_num_threads(),
        },
    }


def void(value: object) -> None:
    """Do nothing."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default 7)")
    parser.add_argument("--patches", type=int, default=8, help="patches (default 8)")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures at once (default 32)")
    parser.add_argument("--side", type=int, default=224, help="side of a patch in pixels (default 224)")
    parser.add_argument("--quick", action="store_true", help="few small patches: does it run?")
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.rounds, arguments.patches, arguments.side = 1, 2, 64
    print(json.dumps(measure(arguments), indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
