"""Evidence of simulated places: what a client reads and workers write, without a model.

    python -m tests.evidence_scale PLACES FOLDER

Writes pieces as the first pass does, finds kinds, writes tables and sums slide by slide, counts and tests; prints the
peak memory of each part, in MiB, as JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from wsi_gradcam.audit.findings import Verdict
from wsi_gradcam.audit.plan import SlideSample, read_arrays, write_arrays
from wsi_gradcam.evidence import DRAWN, PIECE, EvidenceFolder, EvidencePlan, EvidenceSettings
from wsi_gradcam.evidence.clusters import find_kinds
from wsi_gradcam.evidence.findings import Facts, find
from wsi_gradcam.evidence.running import drawn_pieces
from wsi_gradcam.evidence.tables import Given, tally, write_places
from wsi_gradcam.io.paths import storage_path

CHANNELS, SLIDES, GRID = 64, 100, (7, 7)


def plan_of(places: int, folder: Path) -> EvidencePlan:
    """A plan of so many places on a hundred slides; the run has no more than is asked for."""
    each = places // DRAWN // SLIDES
    sample = SlideSample(tuple(range(each)), tuple((64 * i, 0) for i in range(each)), (1.0,) * each, ("any",) * each, 0)
    facts = SimpleNamespace(cam_shape=GRID)
    return EvidencePlan(
        run=cast(Any, SimpleNamespace(out=storage_path(folder), facts=facts)),
        run_digest="run",
        settings=EvidenceSettings(places=places),
        target=cast(Any, SimpleNamespace(label="tumour")),
        samples={f"{i:03d}.tif": sample for i in range(SLIDES)},
    )


def write_pieces(plan: EvidencePlan, folder: EvidenceFolder) -> None:
    """Places of five kinds, in pieces as the first pass leaves them."""
    centres = np.random.default_rng(0).normal(size=(5, CHANNELS))
    for number, (name, sample) in enumerate(plan.samples.items()):
        for piece in range(-(-len(sample.patches) // PIECE)):
            patches = np.array(sample.patches[piece * PIECE : (piece + 1) * PIECE])
            random = np.random.default_rng([number, piece])
            count = DRAWN * len(patches)
            kind = random.integers(0, 5, count)
            features = centres[kind] + 0.3 * random.normal(size=(count, CHANNELS))
            features /= np.linalg.norm(features, axis=1, keepdims=True)
            arrays = {
                "patch/number": patches,
                "patch/yx": np.stack([64 * patches, 0 * patches], axis=1),
                "patch/weight": np.ones(len(patches)),
                "patch/probability": random.random(len(patches)),
                "place/patch": np.repeat(np.arange(len(patches)), DRAWN),
                "place/cell": random.integers(0, GRID[0] * GRID[1], count),
                "place/value": random.exponential(size=count) * np.where(kind < 3, 1, -1),
                "place/weight": np.full(count, GRID[0] * GRID[1] / DRAWN),
                "place/features": features.astype(np.float16),
                "suspect/ink": np.zeros(count, np.float32),
            }
            write_arrays(folder.batch(name, plan.digest, piece), arrays)


def peak() -> float:
    """Peak memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(places: int, place: Path) -> dict[str, float]:
    """Do all of it; return the peaks."""
    from dataclasses import replace

    plan, folder = plan_of(places, place), EvidenceFolder(storage_path(place))
    found = {"planned": peak()}
    write_pieces(plan, folder)
    found["written"], started = peak(), time.process_time()
    choice = find_kinds(drawn_pieces(folder, plan, list(plan.samples)), 0)
    assert choice is not None
    found["kinds"] = peak()
    second = replace(plan, step="sort", kinds=choice.kinds)
    slide = cast(Any, SimpleNamespace(view=(0.0, 0.0, 64.0, 64.0)))
    for name in plan.samples:
        write_arrays(folder.batch(name, second.sums_digest, 0), write_places(folder, second, name, slide, Given()))
    found["sorted"] = peak()
    summed = ((name, read_arrays(folder.batch(name, second.sums_digest, 0))) for name in plan.samples)
    sums, shown = tally(summed, len(choice.kinds))
    learned = Verdict("sanity", "holds", "learned")
    facts = Facts("model", "", "run", "layer", "tumour", 0, places, SLIDES, learned)
    evidence = find(sums, choice, {}, facts)
    assert evidence.places == places
    assert sum(len(own) for own in shown.values()) < 100 * len(choice.kinds)
    return {**found, "counted": peak(), "cpu_s": time.process_time() - started, "kinds_found": len(evidence.kinds)}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), Path(sys.argv[2]))))
