"""Prove that a newer checkout continues the results of an older one, and makes the same results again.

    python -m tests.continuity --old OLD --new NEW --work FOLDER [--slides FILE[=MPP] ...] [--only local,dask,..]

Three slides, those given and as many made here as are missing, are explained at half overlap by two methods and
audited, with the commands of OLD: in one process (`local`, where the audit is asked with annotations and regions, so
all questions), by two workers of Dask (`dask`), and to an S3 server on loopback (`s3`). Then with those of NEW:

- the same commands again: each ends with 0, each slide is skipped, no file is written but those in which a run tells
  of itself, and of the few that are always written again the content stays;
- `validate`, which must find nothing wrong;
- all of it again into an empty OUT. Every value of every array, table and file of numbers must be the same, bit by
  bit, but for what `ALLOWED` names. NaN equals NaN.

In `stopped` OLD is stopped in the midst of explaining, NEW goes on, and likewise in the midst of the audit; the engine
is chosen by `auto`. What OLD had finished must not be written again, and the end must be as if nothing had happened.

Exit status 1 where anything was otherwise. OLD may equal NEW, to see what two runs of one checkout differ in. With
`--tamper` the proof is put to the test: single values of the results made again are changed, and each must be found.
Nothing of either checkout is imported here; FOLDER keeps all results, and `commands.log` what was called.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tifffile
from obstore.store import S3Store
from skimage.data import immunohistochemistry

from tests.comparison import CONTINUED, KINDS, OF_ITSELF, REWRITTEN, TAMPERS, compare, contents
from tests.servers import BUCKET, CREDENTIALS, s3_server

VARIANTS = ("local", "dask", "s3", "stopped")
SLIDES, MADE_PX, MADE_MPP = 3, (900, 1100), 0.5
COMMAND_S = 1800.0
EXPLAIN = (
    "--model",
    "oral-tumour",
    "--target",
    "all",
    "--method",
    "gradcam,layercam",
    "--overlap",
    "0.5",
    "--span-patches",
    "64",
    "--torch-threads",
    "1",
    "--replace-mpp",
)
STEADY = ("--engine", "eager", "--precision", "float32")  # what `auto` chooses depends on how busy the machine is
FLAGS = {"local": (), "dask": ("--workers", "2"), "s3": (), "stopped": ()}
SPANS, PIECES = 3, 2  # finished before a run, or an audit, is stopped
TOLD = 8  # differences of a kind that are printed

# Running the two checkouts


@dataclass(frozen=True)
class Checkout:
    """A checkout of the project; `entry` is the function behind the command `wsi-gradcam`, as "module:function"."""

    folder: Path
    entry: str

    @classmethod
    def at(cls, folder: Path) -> Checkout:
        """The checkout in a folder; its package must be the one that is found from there."""
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        found = cls(folder.resolve(), project["scripts"]["wsi-gradcam"])
        package = found.entry.partition(":")[0].partition(".")[0]
        code = f"import {package}; print({package}.__file__)"
        told = subprocess.run(
            [sys.executable, "-c", code],
            cwd=found.folder,
            env=found.environment(),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        if found.folder not in Path(told).resolve().parents:
            raise SystemExit(f"{folder}: {package} is imported from {told}, not from there")
        return found

    def command(self, *arguments: str) -> list[str]:
        """`wsi-gradcam ARGUMENTS`."""
        module, _, function = self.entry.partition(":")
        code = f"import sys; from {module} import {function}; sys.argv[0] = 'wsi-gradcam'; sys.exit({function}())"
        return [sys.executable, "-c", code, *arguments]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.folder)}


@dataclass(frozen=True)
class Archive:
    """A list of slides, and folders of annotations of each of them."""

    slides: Path
    annotations: Path
    regions: Path


class FailedError(Exception):
    """A command did not end with 0, so what comes after it has no sense."""


@dataclass
class Bench:
    """Both checkouts, what they work on, and what was wrong."""

    old: Checkout
    new: Checkout
    work: Path
    archive: Archive
    patches: int
    problems: list[str] = field(default_factory=list)

    def run(self, checkout: Checkout, *arguments: str) -> str:
        """Run a command to its end, and return what it prints.

        Raises:
            FailedError: its end was not 0.
        """
        started = time.monotonic()
        done = subprocess.run(
            checkout.command(*arguments),
            cwd=checkout.folder,
            env=checkout.environment(),
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
        )
        name = f"{'old' if checkout is self.old else 'new'} {arguments[0]}"
        said = f"{name}: {done.returncode} after {time.monotonic() - started:.1f} s"
        print(f"  {said}", flush=True)
        with (self.work / "commands.log").open("a", encoding="utf-8") as log:
            log.write(f"{said}: {' '.join(arguments)}\n{done.stderr}\n")
        if done.returncode:
            raise FailedError(f"{said}: {' / '.join(done.stderr.splitlines()[-3:])}")
        return done.stdout

    def stop(self, checkout: Checkout, ready: Callable[[], bool], *arguments: str) -> None:
        """Run a command, and end it by SIGTERM when it is `ready`."""
        process = subprocess.Popen(
            checkout.command(*arguments),
            cwd=checkout.folder,
            env=checkout.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not ready():
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        code = process.wait(COMMAND_S)
        print(f"  old {arguments[0]}: stopped, {code}", flush=True)
        if code != 128 + signal.SIGTERM:
            self.problems.append(f"old {arguments[0]} should have been stopped, but ended with {code}")

    def explain(self, out: str, variant: str) -> tuple[str, ...]:
        """Arguments."""
        steady = () if variant == "stopped" else STEADY
        return "explain", str(self.archive.slides), "--out", out, *EXPLAIN, *steady, *FLAGS[variant], "--json"

    def audit(self, out: str, variant: str) -> tuple[str, ...]:
        """Arguments."""
        drawn = ("--annotations", str(self.archive.annotations), "--regions", str(self.archive.regions))
        more = (*drawn, "--target", "tumour") if variant == "local" else ()
        return "audit", out, "--patches", str(self.patches), *more, *FLAGS[variant], "--json"


# What they work on


def write_archive(folder: Path, given: Sequence[str]) -> Archive:
    """The slides given as FILE or FILE=MPP and some that are made; squares are drawn on all of them."""
    archive = Archive(folder / "slides.csv", folder / "annotations", folder / "regions")
    for place in (folder, archive.annotations, archive.regions):
        place.mkdir(parents=True)
    rows = [(str(Path(path).resolve()), mpp) for path, _, mpp in (text.partition("=") for text in given)]
    for number in range(max(1, SLIDES - len(given))):
        path = folder / f"made-{number}.ome.tif"
        picture = np.pad(immunohistochemistry(), [*[(0, side - 512) for side in MADE_PX], (0, 0)], mode="symmetric")
        picture[: 150 + 50 * number] = 243
        tifffile.imwrite(
            path,
            picture,
            ome=True,
            tile=(256, 256),
            photometric="rgb",
            compression="deflate",
            metadata={"axes": "YXS", "PhysicalSizeX": MADE_MPP, "PhysicalSizeY": MADE_MPP},
        )
        rows.append((str(path), ""))
    with archive.slides.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("slide", "mpp", "site", "label"))
        writer.writerows((*row, "north" if i % 2 else "south", "tumour") for i, row in enumerate(rows))
    for slide, _ in rows:
        name = f"{Path(slide).name}.geojson"
        (archive.annotations / name).write_text(squares("tumour", 4, 400, 300), encoding="utf-8")
        (archive.regions / name).write_text(squares("ruler", 24, 120, 30), encoding="utf-8")
    return archive


def squares(name: str, count: int, pitch: int, side: int) -> str:
    """GeoJSON of `count` x `count` squares of a class, in level-0 px."""
    features = []
    for top, left in ((y * pitch + 200, x * pitch + 100) for y in range(count) for x in range(count)):
        bottom, right = top + side, left + side
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        features.append(
            {
                "type": "Feature",
                "properties": {"classification": {"name": name}},
                "geometry": {"type": "Polygon", "coordinates": [ring]},
            }
        )
    return json.dumps({"type": "FeatureCollection", "features": features})


# Where results lie

Stamps = dict[str, tuple[str, str]]  # by name: a digest, and when it was written


@dataclass(frozen=True)
class Out:
    """OUT of a run: a folder, or what lies below `key` in the store."""

    folder: Path
    key: str = ""

    def __str__(self) -> str:
        return f"s3://{BUCKET}/{self.key}" if self.key else str(self.folder)

    def stamps(self) -> Stamps:
        """Of every file."""
        if self.key:
            listed = S3Store(BUCKET, client_options={"allow_http": True}).list(f"{self.key}/").collect()
            return {
                item["path"].removeprefix(f"{self.key}/"): (str(item["e_tag"]), str(item["last_modified"]))
                for item in listed
            }
        return {
            path.relative_to(self.folder).as_posix(): (
                hashlib.sha256(path.read_bytes()).hexdigest(),
                str(path.stat().st_mtime_ns),
            )
            for path in self.folder.rglob("*")
            if path.is_file()
        }

    def copy(self, folder: Path) -> Path:
        """All files in a folder that is not there yet."""
        if not self.key:
            return Path(shutil.copytree(self.folder, folder))
        store = S3Store(BUCKET, client_options={"allow_http": True})
        for name in self.stamps():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(store.get(f"{self.key}/{name}").bytes()))
        return folder


def touched(before: Stamps, after: Stamps) -> list[str]:
    """Files that came, went, changed or were written again, but for those that every run writes."""
    return [
        f"{name}: {'is gone' if name not in after else 'is new' if name not in before else 'was written again'}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
        and not OF_ITSELF.fullmatch(name)
        and not (REWRITTEN.fullmatch(name) and name in before and name in after)
    ]


# The trials


def made(bench: Bench, checkout: Checkout, out: Out, variant: str) -> Out:
    """OUT, explained and audited."""
    bench.run(checkout, *bench.explain(str(out), variant))
    bench.run(checkout, *bench.audit(str(out), variant))
    return out


def continued(bench: Bench, variant: str, out: Out, before: Path) -> None:
    """NEW gets the same commands for OLD's results, of which `before` is a copy."""
    stamps = out.stamps()
    slides = json.loads(bench.run(bench.new, *bench.explain(str(out), variant)))["slides"]
    bench.problems += [
        f"explain: {slide['slide']['id']} was {slide['status']}, and {'skipped' if slide['skipped'] else 'made again'}"
        for slide in slides
        if not slide["skipped"] or slide["status"] != "ok"
    ]
    explained = out.stamps()
    bench.problems += [f"explain again: {words}" for words in touched(stamps, explained)]
    bench.run(bench.new, *bench.audit(str(out), variant))
    audited = out.stamps()
    bench.problems += [f"audit again: {words}" for words in touched(explained, audited)]
    same = compare(before, out.copy(before.with_name("after")), CONTINUED)
    bench.problems += [f"after the same commands: {words}" for _, words in same.wrong]
    kept = sum(stamps[name] == audited.get(name) for name in stamps)
    print(f"  the same commands again: {len(slides)} slides skipped, {kept} of {len(stamps)} files untouched")
    bench.run(bench.new, "validate", str(out))


def anew(bench: Bench, variant: str, out: Out, before: Path, tamper: bool) -> None:
    """NEW makes all of it in another place."""
    found = made(bench, bench.new, out, variant).copy(before.with_name("made"))
    report(bench, before, found)
    if tamper:
        put_to_the_test(bench, before, found)


def stopped(bench: Bench, folder: Path) -> None:
    """OLD is stopped, NEW goes on; beside it OLD makes the same undisturbed."""
    whole, half = made(bench, bench.old, Out(folder / "whole"), "stopped"), Out(folder / "half")

    def spans() -> list[Path]:
        return list(half.folder.glob("*/manifest/spans/*.json"))

    def pieces() -> list[Path]:
        return list(half.folder.glob("audit/*/pieces/*.npz"))

    bench.stop(bench.old, lambda: len(spans()) >= SPANS, *bench.explain(str(half), "stopped"))
    finished = {
        str(file.relative_to(half.folder))
        for span in spans()
        for file in (span.parents[2] / "cams.zarr/cam/c" / str(int(span.stem))).rglob("*")
    }
    goes_on(bench, half, finished, bench.explain(str(half), "stopped"))
    bench.stop(bench.old, lambda: len(pieces()) >= PIECES, *bench.audit(str(half), "stopped"))
    finished = {str(file.relative_to(half.folder)) for file in pieces()}
    goes_on(bench, half, finished, bench.audit(str(half), "stopped"))
    report(bench, whole.folder, half.folder)


def trial(bench: Bench, variant: str, tamper: bool) -> Iterator[Callable[[], None]]:
    """The parts of a trial, to be called one after the other; one that fails leaves the others their sense."""
    (folder := bench.work / variant).mkdir()
    if variant == "stopped":
        yield lambda: stopped(bench, folder)
        return
    with ExitStack() as stack:
        if variant == "s3":
            url = stack.enter_context(s3_server())
            os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=url)
        out, other = (Out(folder / name, f"runs/{name}" if variant == "s3" else "") for name in ("out", "again"))
        before = made(bench, bench.old, out, variant).copy(folder / "before")
        yield lambda: continued(bench, variant, out, before)
        yield lambda: anew(bench, variant, other, before, tamper)


def goes_on(bench: Bench, out: Out, finished: set[str], arguments: tuple[str, ...]) -> None:
    """NEW goes on where OLD was stopped, and leaves alone what was finished."""
    before = {name: stamp for name, stamp in out.stamps().items() if name in finished}
    bench.run(bench.new, *arguments)
    after = {name: stamp for name, stamp in out.stamps().items() if name in finished}
    print(f"  {len(before)} files of what was finished before {arguments[0]} was stopped")
    bench.problems += [f"{arguments[0]}, gone on with: {words}" for words in touched(before, after)]
    if not before:
        bench.problems.append(f"{arguments[0]} was stopped before anything was finished")


def report(bench: Bench, old: Path, new: Path) -> None:
    """Compare results; print a table, and of each kind the first differences."""
    found = compare(old, new)
    print(f"\n{found.table()}\n")
    for words in firsts(found.allowed):
        print(f"  allowed: {words}")
    bench.problems += firsts(found.wrong)


def firsts(found: Sequence[tuple[str, str]]) -> list[str]:
    """The first of each kind, and how many more there are."""
    told = []
    for kind in KINDS:
        words = [words for known, words in found if known == kind]
        told += words[:TOLD] + ([f"{kind}: {len(words) - TOLD} more"] if len(words) > TOLD else [])
    return told


# Whether it would find anything


def put_to_the_test(bench: Bench, old: Path, new: Path) -> None:
    """Change one value after the other in the results made again, and see each found."""
    for pattern, change in TAMPERS:
        name = next(name for name in sorted(contents(new)) if re.fullmatch(pattern, name))
        place = contents(new)[name]
        kept = place.with_name("kept")
        (shutil.copytree if place.is_dir() else shutil.copy2)(place, kept)
        change(place)
        found = [words for _, words in compare(old, new).wrong if words.startswith(name)]
        (shutil.rmtree if place.is_dir() else Path.unlink)(place) if place.exists() else None
        kept.rename(place)
        print(f"  changed and {'found' if found else 'NOT FOUND'}: {found[-1] if found else name}")
        if not found:
            bench.problems.append(f"a change of {name} was not found")
    stamps = Out(new).stamps()
    name = next(name for name in stamps if name.endswith("patches.parquet"))
    (new / name).write_bytes((new / name).read_bytes())
    found = touched(stamps, Out(new).stamps())
    print(f"  written again with the same bytes: {found}")
    if found != [f"{name}: was written again"]:
        bench.problems.append(f"that {name} was written again was not found")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where NEW does not go on with OLD's results, or makes others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="the older checkout")
    parser.add_argument("--new", type=Path, required=True, help="the newer one")
    parser.add_argument("--work", type=Path, required=True, help="a folder for everything, which is kept")
    parser.add_argument("--slides", nargs="+", default=[], metavar="FILE[=MPP]", help="real slides (default: none)")
    parser.add_argument("--only", default=",".join(VARIANTS), help=f"some of {','.join(VARIANTS)} (default: all)")
    parser.add_argument("--patches", type=int, default=24, help="of an audit (default 24; 17 or more for `stopped`)")
    parser.add_argument("--tamper", action="store_true", help="also see that changed values are found")
    arguments = parser.parse_args(argv)
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(VARIANTS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is not one of {', '.join(VARIANTS)}")
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for name in ("archive", "cache", *chosen):
        shutil.rmtree(work / name, ignore_errors=True)
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    archive = write_archive(work / "archive", arguments.slides)
    bench = Bench(Checkout.at(arguments.old), Checkout.at(arguments.new), work, archive, arguments.patches)
    wrong: list[str] = []
    for variant in chosen:
        started, bench.problems = time.monotonic(), []
        print(f"{variant}:", flush=True)
        for part in trial(bench, variant, arguments.tamper):
            try:
                part()
            except (FailedError, subprocess.TimeoutExpired) as error:
                bench.problems.append(str(error))
        for words in bench.problems:
            print(f"  PROBLEM: {words}")
        print(f"{variant}: {len(bench.problems)} problems, {time.monotonic() - started:.0f} s\n", flush=True)
        wrong += bench.problems
    print(f"{len(wrong)} problems in {', '.join(chosen)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
