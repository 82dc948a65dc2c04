"""Damages slides in many ways and reads them: nothing may crash, hang, take much memory, or show what was not written.

    python -m tests.fuzz [--kind slides] [--cases 10000] [--seed 0] [--keep FOLDER]

Cases of an even number damage any bytes of whole files, and little is known of what they show then. Those of an odd
one know all pixels (`tests.fuzz_truths`) and damage data within tiles, leave tiles out, or store colours and levels as
some writers do: what was written is shown, or nothing is.

Cases run in a process of their own, some hundred at a time, with bounds on memory and on the time of each. What breaks
a bound, kills the process, or raises what is no `SlideError`, is printed with the number of its case, which
`--only NUMBER` repeats.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from tests.fuzz_documents import KINDS, in_children
from tests.fuzz_documents import fuzz as fuzz_documents
from tests.fuzz_truths import truth_case
from tests.runs import ROOT
from tests.synthetic import write_marker_slide
from wsi_gradcam.errors import SlideError
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides import open_slide, read_region, thumbnail

CASE_S, CASE_BYTES = 5, 1 << 30
PATCH_PX = 64
REAL = ROOT.parent / "shared/data/slides"

Bytes = bytearray
Random = np.random.Generator


def sources(folder: Path) -> list[Path]:
    """Whole slides of several formats and codecs, some of them real."""
    picture = write_marker_slide(
        folder / "deflate.tif", 300, 420, mpp=0.5, markers=[(100, 200)], marker_px=60, tile_px=128
    ).level0
    write_marker_slide(
        folder / "jpeg.tif", 300, 420, mpp=0.5, markers=[(9, 9)], marker_px=9, tile_px=128, compression="jpeg"
    )
    aperio = "Aperio Image Library v1\n420x300 (128x128)|AppMag = 20|MPP = 0.5"
    for name, codec, options in (
        ("lzw.svs", "lzw", {"description": aperio}),
        ("jp2k.svs", "aperio_jp2000_rgb", {"description": aperio}),
        ("plain.tif", None, {"bigtiff": True}),
        ("planar.tif", "zstd", {"planarconfig": "separate"}),
    ):
        data = np.moveaxis(picture, -1, 0) if "planarconfig" in options else picture
        tifffile.imwrite(
            folder / name, data, tile=(128, 128), photometric="rgb", compression=codec, metadata=None, **options
        )
    with tifffile.TiffWriter(folder / "a.ome.tif", ome=True) as writer:
        more: Any = {"photometric": "rgb", "tile": (128, 128), "compression": "deflate"}
        writer.write(picture, subifds=1, metadata={"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}, **more)
        writer.write(picture[::2, ::2], subfiletype=1, **more)
    Image.fromarray(picture).save(folder / "a.png")
    Image.fromarray(picture).save(folder / "a.jpg")
    real = [
        REAL / "aperio/CMU-1-Small-Region.svs",
        *sorted((REAL / "tiff").glob("*.tif"))[:3],
        *(REAL / "dicom").rglob("*.dcm"),
    ]
    return sorted(folder.iterdir()) + [path for path in real if path.is_file()]


def flip_bits(data: Bytes, rng: Random) -> None:
    for at in rng.integers(0, len(data), rng.integers(1, 9)):
        data[at] ^= 1 << int(rng.integers(8))


def flip_head(data: Bytes, rng: Random) -> None:
    for at in rng.integers(0, min(len(data), 600), rng.integers(1, 6)):
        data[at] ^= 1 << int(rng.integers(8))


def cut(data: Bytes, rng: Random) -> None:
    del data[int(rng.integers(1, len(data))) :]


def splice(data: Bytes, rng: Random) -> None:
    length = int(rng.integers(1, min(4096, len(data))))
    start, target = (int(v) for v in rng.integers(0, len(data) - length + 1, 2))
    data[target : target + length] = data[start : start + length]


def change_tag(data: Bytes, rng: Random) -> None:
    """An entry of some directory of a classic or Big TIFF gets another type, count or value."""
    entries = list(tags(bytes(data)))
    if not entries:
        flip_head(data, rng)
        return
    for _ in range(int(rng.integers(1, 4))):
        order, at, size = entries[int(rng.integers(len(entries)))]
        value = int(rng.choice([0, 1, 2, 255, 65535, 2**31 - 1, 2**32 - 1, int(rng.integers(2**32))]))
        field = int(rng.integers(3))
        if field == 0:
            struct.pack_into(order + "H", data, at + 2, value % 20)
        else:
            half = (size - 4) // 2
            struct.pack_into(order + ("I" if half == 4 else "Q"), data, at + 4 + half * (field - 1), value)


def tags(data: bytes) -> Iterator[tuple[str, int, int]]:
    """(byte order, place, length) of each directory entry."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 16:
        return
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    word, entry, number = ("Q", 20, "Q") if big else ("I", 12, "H")
    at = struct.unpack_from(order + word, data, 8 if big else 4)[0]
    for _ in range(8):
        if not 0 < at < len(data) - 16:
            return
        count = min(struct.unpack_from(order + number, data, at)[0], 60)
        first = at + struct.calcsize(number)
        places = [first + entry * i for i in range(count) if first + entry * (i + 1) + 8 <= len(data)]
        yield from ((order, place, entry) for place in places)
        if len(places) < count:
            return
        at = struct.unpack_from(order + word, data, first + entry * count)[0]


DAMAGE: list[Callable[[Bytes, Random], None]] = [flip_bits, flip_head, cut, splice, change_tag, change_tag]
# Those that leave every tile's bytes as they were: what was not black before is read right or not at all.
STRUCTURAL = (cut, change_tag)


def damaged(number: int, seed: int, files: list[Path], folder: Path) -> tuple[Path, Path, bool]:
    """(the damaged copy, its source, whether only the structure was damaged) of a case."""
    rng = np.random.default_rng([seed, number])
    source = files[number // 2 % len(files)]
    how = DAMAGE[int(rng.integers(len(DAMAGE)))]
    data = bytearray(source.read_bytes())
    how(data, rng)
    # A folder a case: OpenSlide takes the DICOM files of a folder together.
    path = folder / str(number) / source.name
    path.parent.mkdir()
    path.write_bytes(data)
    return path, source, how in STRUCTURAL


def look(path: Path) -> list[npt.NDArray[np.uint8]]:
    """Some of a slide's pixels; a region that cannot be read is left out."""
    slide = open_slide(path, 0.5)
    try:
        info = slide.info
        places = [(0, 0), (info.height // 2, info.width // 2), (info.height - 30, info.width - 30)]
        found = []
        for y, x in places:
            try:
                found.append(read_region(slide, y, x, PATCH_PX, PATCH_PX, 0.5))
                found.append(read_region(slide, y, x, PATCH_PX, PATCH_PX, 1.3))
            except SlideError:
                continue
        last = len(info.levels) - 1
        try:
            found.append(slide.read_level(last, Region(0, 0, PATCH_PX, PATCH_PX)))
            found.append(thumbnail(slide, 8.0, 256).rgb)
        except SlideError:
            pass
        return found
    finally:
        slide.close()


def check(number: int, seed: int, files: list[Path], folder: Path) -> str:
    """What is wrong in how a case is dealt with; nothing where all is well."""
    if number % 2:
        return check_truth(number, seed, folder)
    path, source, structural = damaged(number, seed, files, folder)
    started = time.monotonic()
    signal.alarm(2 * CASE_S)
    try:
        seen = look(path)
    except SlideError as error:
        seen = []
        if str(path) not in str(error):
            return f"the error does not name the file: {error}"
    except BaseException:
        return traceback.format_exc(limit=-4)
    finally:
        signal.alarm(0)
        shutil.rmtree(path.parent)
    if structural and any(not part.any() for part in seen) and all(part.any() for part in look(source)):
        return "black where there was none"
    seconds = time.monotonic() - started
    return f"took {seconds:.1f} s" if seconds > CASE_S else ""


def check_truth(number: int, seed: int, folder: Path) -> str:
    """The same of a case whose pixels are known."""
    started = time.monotonic()
    signal.alarm(2 * CASE_S)
    try:
        problems = truth_case(number, seed, folder)
    except BaseException:
        return traceback.format_exc(limit=-4)
    finally:
        signal.alarm(0)
        shutil.rmtree(folder / str(number), ignore_errors=True)
    seconds = time.monotonic() - started
    return "; ".join(problems[:3]) or (f"took {seconds:.1f} s" if seconds > CASE_S else "")


def run_cases(first: int, count: int, seed: int) -> int:
    """In a child: check cases, print what is wrong; the number of the case at work goes first."""
    resource.setrlimit(resource.RLIMIT_DATA, (CASE_BYTES, CASE_BYTES))
    wrong = 0
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as folder:
        files = sources(Path(made))
        for number in range(first, first + count):
            print(f"case {number}", flush=True)
            if problem := check(number, seed, files, Path(folder)):
                wrong += 1
                name = "known pixels" if number % 2 else files[number // 2 % len(files)].name
                print(f"WRONG {number} {name}: {problem}", flush=True)
    return wrong


def fuzz(cases: int, seed: int = 0, first: int = 0) -> list[str]:
    """What went wrong in that many cases, a line or a traceback each."""

    def command(number: int, count: int) -> list[str]:
        return ["tests.fuzz", "--child", str(number), str(count), "--seed", str(seed)]

    return in_children(command, cases, first, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this case alone")
    parser.add_argument(
        "--kind", choices=["slides", "all", *KINDS], default="slides", help="documents: fuzz_documents.py"
    )
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        first, count = arguments.child
        run_cases(first, count, arguments.seed)
        return
    first, cases = (0, arguments.cases) if arguments.only is None else (arguments.only, 1)
    started = time.monotonic()
    kinds = ["slides", *KINDS] if arguments.kind == "all" else [arguments.kind]
    problems = []
    for kind in kinds:
        more = (
            fuzz(cases, arguments.seed, first)
            if kind == "slides"
            else fuzz_documents(kind, cases, arguments.seed, first)
        )
        problems += more
    print(*problems, sep="\n")
    print(f"{cases:,} cases of {', '.join(kinds)}, {len(problems)} problems, {time.monotonic() - started:.0f} s")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
