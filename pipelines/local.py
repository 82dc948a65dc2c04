"""Explain the slides of a folder on this machine and check the results, through the public Python calls.

    python pipelines/local.py slides/ --model oral-tumour --target tumour --out results-local/ --workers 2

Copy it and change what you need. The guard at the end matters: worker processes import this file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import wsi_gradcam


def main() -> int:
    """Explain the slides, and return 0 if every slide is finished and valid."""
    parser = argparse.ArgumentParser(description="Explain slides on this machine and check the results.")
    parser.add_argument("slides", nargs="+", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--target", action="append", default=[])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--workers", type=int)
    arguments = parser.parse_args()

    outcome = wsi_gradcam.explain(
        arguments.slides,
        arguments.model,
        arguments.out,
        target=arguments.target,
        overlap=0.5,
        workers=arguments.workers,
    )
    for record in outcome.records:
        print(f"{record.slide.id}: {record.status} {record.error}".rstrip())
    findings = wsi_gradcam.validate(arguments.out)
    for finding in findings:
        print(f"{finding.slide}: {finding.problem}")
    return 1 if outcome.failed or findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
