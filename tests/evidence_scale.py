"""Evidence of many places, and of many slides: the memory that a client needs.

    python -m tests.evidence_scale places COUNT FOLDER
    python -m tests.evidence_scale slides COUNT FOLDER [--plan]

The first simulates places without a model: it writes pieces as the first pass does, finds kinds, writes tables and sums
slide by slide, counts and tests. The second explains a slide, lists it under so many names, and does all that
`wsi-gradcam evidence` does with them, in one process; with --plan only what the client does before work begins. Both
print the peak memory of each part, in MiB, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from wsi_gradcam.audit.findings import Verdict
from wsi_gradcam.audit.plan import read_arrays, write_arrays
from wsi_gradcam.evidence import DRAWN, PIECE, EvidenceFolder, EvidencePlan, EvidenceSettings, SlideShare
from wsi_gradcam.evidence.clusters import find_kinds
from wsi_gradcam.evidence.findings import Facts, find
from wsi_gradcam.evidence.running import drawn_pieces
from wsi_gradcam.evidence.tables import Given, tally, write_places
from wsi_gradcam.io.paths import storage_path

CHANNELS, SLIDES, GRID = 64, 100, (7, 7)


def plan_of(places: int, folder: Path) -> EvidencePlan:
    """A plan of so many places on a hundred slides; the run has no more than is asked for."""
    each = places // DRAWN // SLIDES
    names = [f"{i:03d}.tif" for i in range(SLIDES)]
    facts = SimpleNamespace(cam_shape=GRID)
    return EvidencePlan(
        run=cast(Any, SimpleNamespace(out=storage_path(folder), facts=facts)),
        run_digest="run",
        settings=EvidenceSettings(places=places),
        target=cast(Any, SimpleNamespace(label="tumour")),
        shares=dict.fromkeys(names, SlideShare(each)),
        counts=dict.fromkeys(names, each),
    )


def write_pieces(plan: EvidencePlan, folder: EvidenceFolder) -> None:
    """Places of five kinds, in pieces as the first pass leaves them."""
    centres = np.random.default_rng(0).normal(size=(5, CHANNELS))
    for number, (name, each) in enumerate(plan.counts.items()):
        for piece in range(-(-each // PIECE)):
            patches = np.arange(piece * PIECE, min(each, (piece + 1) * PIECE))
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


def of_places(places: int, place: Path) -> dict[str, float]:
    """Return the peaks of simulated places."""
    from dataclasses import replace

    plan, folder = plan_of(places, place), EvidenceFolder(storage_path(place))
    found = {"planned": peak()}
    write_pieces(plan, folder)
    found["written"], started = peak(), time.process_time()
    choice = find_kinds(drawn_pieces(folder, plan, list(plan.counts)), 0)
    assert choice is not None
    found["kinds"] = peak()
    second = replace(plan, step="sort", kinds=choice.kinds)
    slide = cast(Any, SimpleNamespace(view=(0.0, 0.0, 64.0, 64.0)))
    for name in plan.counts:
        write_arrays(folder.batch(name, second.sums_digest, 0), write_places(folder, second, name, slide, Given()))
    found["sorted"] = peak()
    summed = ((name, read_arrays(folder.batch(name, second.sums_digest, 0))) for name in plan.counts)
    sums, shown = tally(summed, len(choice.kinds))
    learned = Verdict("sanity", "holds", "learned")
    facts = Facts("model", "", "run", "layer", "tumour", 0, places, SLIDES, learned)
    evidence = find(sums, choice, {}, facts)
    assert evidence.places == places
    assert sum(len(own) for own in shown.values()) < 100 * len(choice.kinds)
    return {**found, "counted": peak(), "cpu_s": time.process_time() - started, "kinds_found": len(evidence.kinds)}


def listed_often(place: Path, slides: int) -> Path:
    """Explain a slide, and return the results in which it has so many names; their files are one and the same."""
    from tests.evidence_runs import explained, model_file, of_nuclei, write_archive

    place.mkdir(parents=True)
    out = explained(write_archive(place, 1, 0, 0), model_file(place, of_nuclei(0)), place / "out")
    (name,) = (path.parent.name for path in out.glob("*/patches.parquet"))
    names = [name, *(f"{i:06d}.tif" for i in range(1, slides))]
    for one in names[1:]:
        (out / one / "manifest").mkdir(parents=True)
        for file in (
            "patches.parquet",
            *(f"manifest/{path.name}" for path in (out / name / "manifest").glob("*.json")),
        ):
            os.link(out / name / file, out / one / file)
    head, row, *_ = (out / "slides.csv").read_text(encoding="utf-8").splitlines()
    rows = [row.replace(name, one, 1) for one in names]
    (out / "slides.csv").write_text("\n".join([head, *rows, ""]), encoding="utf-8")
    line = json.loads((out / "slides.jsonl").read_text(encoding="utf-8").splitlines()[0])
    lines = [json.dumps(line | {"id": one, "site": "south" if i % 3 else "north"}) for i, one in enumerate(names)]
    (out / "slides.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return out


def of_slides(slides: int, place: Path, plan_only: bool) -> dict[str, float]:
    """Return the peaks of evidence of many slides, of a dozen places each."""
    from wsi_gradcam.audit.archive import open_run
    from wsi_gradcam.evidence.running import evidence_run, shares_of
    from wsi_gradcam.executors import SerialExecutor
    from wsi_gradcam.results.run import open_result

    subprocess.run([sys.executable, "-m", "tests.evidence_scale", "list", str(slides), str(place)], check=True)
    out, found, started = place / "out", {"begun": peak()}, time.process_time()
    if plan_only:
        run, settings = open_run(open_result(out), trust_code=True), EvidenceSettings(places=32 * slides)
        eager = run.plan(SerialExecutor().examine(run.spec, run.model_settings, [], None))
        found["opened"] = peak()
        shares = shares_of(run, settings, None)
        plan = EvidencePlan(
            run=eager, run_digest="run", settings=settings, target=eager.targets[0], shares=shares, counts={}
        )
        assert len(plan.digest) == 64
        found["planned"] = peak()
        found["plan_bytes"] = len(pickle.dumps(plan))
    else:
        evidence = evidence_run(out, places=32 * slides, trust_code=True, skip_labels=True).evidence
        assert evidence.slides == slides
        found["done"] = peak()
    return {**found, "cpu_s": time.process_time() - started}


def main() -> None:
    """Print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["places", "slides", "list"], help="list: only make the results of slides")
    parser.add_argument("count", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plan", action="store_true", help="of slides, only what comes before work begins")
    options = parser.parse_args()
    if options.what == "list":
        listed_often(options.folder, options.count)
    elif options.what == "places":
        print(json.dumps(of_places(options.count, options.folder)))
    else:
        print(json.dumps(of_slides(options.count, options.folder, options.plan)))


if __name__ == "__main__":
    main()
