"""How often each verdict of the audit is right where the truth is known, over seeds that none was tuned with.

    python -m tests.planted_rates [--seeds N] [--first SEED] [--only WORD] [--json]

Prints a table in Markdown, or with --json the same as one object, in the order of `tests.planted_truths.TRUTHS`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tests.planted_truths import TRUTHS, Truth
from wsi_gradcam.audit.verdict import Outcome

OUTCOMES: tuple[Outcome, ...] = ("holds", "unclear", "fails")


@dataclass(frozen=True)
class Rate:
    """A truth, and how often each outcome was found."""

    truth: Truth
    counts: Counter[str]
    seconds: float

    @property
    def right(self) -> int:
        return sum(self.counts[outcome] for outcome in self.truth.expected)

    @property
    def wrong(self) -> int:
        return sum(self.counts[outcome] for outcome in self.truth.wrong)


def rate(truth: Truth, seeds: Sequence[int]) -> Rate:
    started = time.perf_counter()
    return Rate(truth, Counter(truth.judge(seed) for seed in seeds), time.perf_counter() - started)


def row(found: Rate) -> str:
    """A line of the table."""
    total = sum(found.counts.values())
    expected = " or ".join(found.truth.expected)
    shares = (f"{100 * count / total:.0f} %" for count in (found.right, found.wrong))
    counts = " / ".join(str(found.counts[outcome]) for outcome in OUTCOMES)
    return f"| `{found.truth.verdict}` | {found.truth.case} | {expected} | {counts} | {' | '.join(shares)} |"


def as_json(found: Rate) -> dict[str, object]:
    return {
        "verdict": found.truth.verdict,
        "case": found.truth.case,
        "expected": found.truth.expected,
        "outcomes": {outcome: found.counts[outcome] for outcome in OUTCOMES},
        "right": found.right,
        "wrong": found.wrong,
        "seconds": round(found.seconds, 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where a truth is right in less than 95 % or wrong in more than 5 % of the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50, help="how many (default 50)")
    parser.add_argument("--first", type=int, default=1000, help="the first of them (default 1000)")
    parser.add_argument("--only", default="", help="truths whose verdict or case contains this word")
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    chosen = [truth for truth in TRUTHS if arguments.only in f"{truth.verdict} {truth.case}"]
    if not arguments.json:
        print("| verdict | case | must say | holds / unclear / fails | right | wrong |\n|---|---|---|---|---|---|")
    found = []
    for truth in chosen:
        found.append(rate(truth, seeds))
        if not arguments.json:
            print(row(found[-1]), flush=True)
    if arguments.json:
        print(json.dumps({"first": arguments.first, "seeds": arguments.seeds, "rates": [as_json(r) for r in found]}))
    missed = [r for r in found if r.right < 0.95 * len(seeds) or r.wrong > 0.05 * len(seeds)]
    print(f"{len(found) - len(missed)} of {len(found)} truths are told as they should be", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
