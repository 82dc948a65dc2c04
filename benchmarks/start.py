"""How quickly the command line responds, and how much is installed.

`cpu_s` is user plus system time of whole processes, the median of turns that alternate: a bare interpreter, `import
wsi_gradcam`, `wsi-gradcam --help` and `wsi-gradcam explain --help`. With `--against`, another checkout takes turns with
this one, and `ratios` are ours over theirs.

`installed` is what pip brings for the package without extras, as `pyproject.toml` and the metadata of this environment
say, in which all of it must be installed: the number of packages, and megabytes of their files without Python's
bytecode, in all and without PyTorch and what CUDA needs.

    python benchmarks/start.py [--against CHECKOUT] [--turns 8] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "python": ("-c", "pass"),
    "import": ("-c", "import wsi_gradcam"),
    "help": ("-m", "wsi_gradcam.cli", "--help"),
    "explain_help": ("-m", "wsi_gradcam.cli", "explain", "--help"),
}
OF_TORCH = ("torch", "triton", "nvidia-", "cuda-")  # the beginnings of names


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--turns", type=int, default=8, help="(default 8)")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    arguments = parser.parse_args(argv)
    sides = {"ours": ROOT} | ({"theirs": arguments.against.resolve()} if arguments.against else {})
    figures = figures_of(sides, arguments.turns)
    print(json.dumps(figures, indent=None if arguments.json else 1))


def figures_of(sides: dict[str, Path], turns: int) -> dict[str, Any]:
    """Return CPU seconds by side and command, ratios, and how much is installed."""
    seconds = cpu_seconds(sides, turns)
    ours, theirs = seconds["ours"], seconds.get("theirs")
    ratios = {} if theirs is None else {f"{name}_over_theirs": ours[name] / theirs[name] for name in COMMANDS}
    ratios |= {f"{name}_over_python": ours[name] / ours["python"] for name in COMMANDS if name != "python"}
    return {"cpu_s": seconds, "ratios": ratios, "installed": {side: installed(at) for side, at in sides.items()}}


def cpu_seconds(sides: dict[str, Path], turns: int) -> dict[str, dict[str, float]]:
    """Return the median CPU seconds of each command on each side, which take turns."""
    found: dict[str, dict[str, list[float]]] = {side: {name: [] for name in COMMANDS} for side in sides}
    for _ in range(turns):
        for name, command in COMMANDS.items():
            for side, checkout in sides.items():
                found[side][name].append(cpu_of(command, checkout))
    return {side: {name: statistics.median(all_) for name, all_ in by.items()} for side, by in found.items()}


def cpu_of(command: Sequence[str], checkout: Path) -> float:
    """Return the CPU seconds of one process of the interpreter, which imports from a checkout."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run([sys.executable, *command], env=environment, cwd="/", stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def installed(checkout: Path) -> dict[str, int]:
    """Return how many packages a checkout needs, including itself, and their megabytes."""
    project = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    sizes = {name: size_of(found) for name, found in needed(project["dependencies"]).items()}
    own = sum(path.stat().st_size for path in (checkout / "wsi_gradcam").rglob("*") if is_counted(path))
    rest = own + sum(size for name, size in sizes.items() if not name.startswith(OF_TORCH) or name == "torchvision")
    return {
        "packages": len(sizes) + 1,
        "mb": round((own + sum(sizes.values())) / 1e6),
        "mb_without_torch": round(rest / 1e6),
    }


def needed(requirements: Sequence[str]) -> dict[str, Distribution]:
    """Return the packages that pip installs for some requirements, by name; those not installed are left out."""
    found: dict[str, Distribution] = {}
    left, seen = list(parsed(requirements)), set()
    while left:
        name, extras = left.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found[name] = found.get(name) or distribution(name)
        except PackageNotFoundError:  # for another platform, say
            continue
        left += parsed(found[name].requires or (), extras)
    return found


def parsed(requirements: Sequence[str], extras: frozenset[str] = frozenset()) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield names and extras of the requirements that count here for a package with some extras."""
    for text in requirements:
        one = Requirement(text)
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras or {""}):
            yield canonicalize_name(one.name), frozenset(one.extras)


def size_of(of: Distribution) -> int:
    """Return the bytes of a package's files without bytecode."""
    return sum(
        path.stat().st_size for path in (Path(str(file.locate())) for file in of.files or ()) if is_counted(path)
    )


def is_counted(path: Path) -> bool:
    """Return whether a file counts, as bytecode does not."""
    return path.suffix != ".pyc" and path.is_file()


if __name__ == "__main__":
    main()
