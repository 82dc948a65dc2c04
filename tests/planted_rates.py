"""Count how often each verdict of the audit is right where the truth is known, with seeds that nothing was tuned on.

    python -m tests.planted_rates [--seeds N] [--first SEED] [--jobs N] [--only WORD] [--results FILE] [--json]

Prints a table in Markdown, or with --json the same as one object, in the order of `tests.planted_truths.TRUTHS`,
and after them those of `tests.planted_bags.BAG_TRUTHS` ("slides, ..."). With
--results outcomes are added to the file seed by seed, and those that are in it are not judged again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tests.planted_bags import BAG_TRUTHS, BagTruth
from tests.planted_truths import TRUTHS, Outcome, Truth

EVERY: tuple[Truth | BagTruth, ...] = (*TRUTHS, *BAG_TRUTHS)
OUTCOMES: tuple[Outcome, ...] = ("holds", "unclear", "fails")


@dataclass(frozen=True)
class Finding:
    """The outcome of a truth with a seed, and the seconds of processor time that it took."""

    truth: str
    seed: int
    outcome: Outcome
    seconds: float


@dataclass(frozen=True)
class Rate:
    """A truth, and how often each outcome was found."""

    truth: Truth | BagTruth
    counts: Counter[str]
    seconds: float

    @property
    def right(self) -> int:
        return sum(self.counts[outcome] for outcome in self.truth.expected)

    @property
    def wrong(self) -> int:
        return sum(self.counts[outcome] for outcome in self.truth.wrong)


def find(truths: Iterable[str], seed: int) -> list[Finding]:
    """Judge the truths of these names with a seed, on one thread."""
    torch.set_num_threads(1)
    wanted, found = set(truths), []
    for truth in EVERY:
        if truth.name in wanted:
            started = time.process_time()
            outcome = truth.judge(seed)
            found.append(Finding(truth.name, seed, outcome, time.process_time() - started))
    return found


def rate(truth: Truth | BagTruth, findings: Iterable[Finding]) -> Rate:
    mine = [one for one in findings if one.truth == truth.name]
    return Rate(truth, Counter(one.outcome for one in mine), sum(one.seconds for one in mine))


def row(found: Rate) -> str:
    """A line of the table."""
    total = max(1, sum(found.counts.values()))
    truth, expected = found.truth, " or ".join(found.truth.expected)
    shares = (f"{100 * count / total:.0f}%" for count in (found.right, found.wrong))
    counts = " / ".join(str(found.counts[outcome]) for outcome in OUTCOMES)
    return f"| {truth.about} | {truth.case} | {expected} | {counts} | {' | '.join(shares)} |"


def as_json(found: Rate) -> dict[str, object]:
    return {
        **asdict(found.truth.about),
        "case": found.truth.case,
        "expected": found.truth.expected,
        "outcomes": {outcome: found.counts[outcome] for outcome in OUTCOMES},
        "right": found.right,
        "wrong": found.wrong,
        "seconds": round(found.seconds, 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where a truth is right in less than 95% or wrong in more than 5 % of the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50, help="how many (default 50)")
    parser.add_argument("--first", type=int, default=1000, help="the first of them (default 1000)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--only", default="", help="truths whose name contains this word")
    parser.add_argument("--results", type=Path, help="a file of outcomes, to go on with after a stop")
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    arguments = parser.parse_args(argv)
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    chosen = [truth for truth in EVERY if arguments.only in truth.name]
    known = _read(arguments.results)
    findings = [known[truth.name, seed] for truth in chosen for seed in seeds if (truth.name, seed) in known]
    missing = {seed: [truth.name for truth in chosen if (truth.name, seed) not in known] for seed in seeds}
    for new in _found({seed: names for seed, names in missing.items() if names}, arguments.jobs):
        findings += new
        _write(arguments.results, new)
    rates = [rate(truth, findings) for truth in chosen]
    if arguments.json:
        print(
            json.dumps({"first": arguments.first, "seeds": arguments.seeds, "rates": [as_json(one) for one in rates]})
        )
    else:
        print("| verdict | case | must say | holds / unclear / fails | right | wrong |\n|---|---|---|---|---|---|")
        print("\n".join(row(one) for one in rates))
    few = 0.95 * arguments.seeds
    return int(any(one.right < few or one.wrong > arguments.seeds - few for one in rates))


def _found(missing: dict[int, list[str]], jobs: int) -> Iterator[list[Finding]]:
    """Judge the truths of each seed, a process a seed, as they are done."""
    if jobs == 1:
        yield from (find(names, seed) for seed, names in missing.items())
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for done in as_completed([pool.submit(find, names, seed) for seed, names in missing.items()]):
            yield done.result()


def _read(path: Path | None) -> dict[tuple[str, int], Finding]:
    lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []
    findings = [Finding(**json.loads(line)) for line in lines]
    return {(one.truth, one.seed): one for one in findings}


def _write(path: Path | None, findings: Iterable[Finding]) -> None:
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(asdict(one))}\n" for one in findings)


if __name__ == "__main__":
    sys.exit(main())
