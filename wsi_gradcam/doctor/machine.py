"""Checks of this process: packages, devices, codecs, the memory of engines."""

from __future__ import annotations

import platform
import tempfile
import uuid
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_gradcam.doctor.environment import (
    FAIL,
    OK,
    OPTIONAL,
    PACKAGES,
    PROGRAM,
    WARN,
    Check,
    cores,
    gpus,
    guarded,
    low_precision,
    version_of,
)
from wsi_gradcam.errors import one_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GIB = 1 << 30
# Of tiles in TIFF slides: the codec, and how far a decoded value may be from the true one.
CODECS = {"jpeg": 12, "jpeg2000": 12, "lzw": 0, "adobe_deflate": 0, "zstd": 0}
NVIDIA = Path("/proc/driver/nvidia/version")


def this_machine() -> Iterator[Check]:
    """All checks of this process."""
    yield from guarded("Python", _python)
    for name in (*PACKAGES, *OPTIONAL):
        yield from guarded(name, _package, name)
    yield from guarded("CPU", _cpu)
    yield from guarded("GPU", _gpu)
    for codec in CODECS:
        yield from guarded(f"codec {codec}", _codec, codec)
    yield from guarded("OpenSlide", _openslide)
    yield from guarded("engine choices", _choices)


def _python() -> Iterator[Check]:
    asked = _asked("python")
    fits = platform.python_version() in asked
    mend = "" if fits else f"make an environment with Python {asked}"
    yield Check(
        "Python",
        OK if fits else FAIL,
        f"{platform.python_version()}, {PROGRAM} {version_of(PROGRAM)}, {platform.platform()}",
        mend,
    )


def _package(name: str) -> Iterator[Check]:
    found, asked = version_of(name), _asked(name)
    wanted = f"pip install '{name}{asked}'"
    if found is None and name in OPTIONAL:
        yield Check(name, OK, "not installed; it makes networks faster on CPUs", f"{wanted}, if you want it")
    elif found is None:
        yield Check(name, FAIL, "not installed", wanted)
    elif found not in asked:
        yield Check(name, FAIL, f"{found}, expected {asked}", wanted)
    else:
        yield Check(name, OK, found)


def _asked(name: str) -> Any:
    """The versions of a package, or of Python, that this program asks for."""
    from importlib.metadata import metadata

    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    ours = metadata(PROGRAM)
    if name == "python":
        return SpecifierSet(ours["Requires-Python"], prereleases=True)
    asked = [Requirement(text) for text in ours.get_all("Requires-Dist") or []]
    found = next((one.specifier for one in asked if one.name.lower() == name), SpecifierSet())
    found.prereleases = True
    return found


def _cpu() -> Iterator[Check]:
    import torch

    able = ", ".join(low_precision()) or "no bfloat16 or AMX: --precision bfloat16 brings nothing"
    found = f"{cores()} cores, torch uses {torch.get_num_threads()} threads, {able}"
    if torch.get_num_threads() > cores():
        yield Check("CPU", WARN, found, f"more threads than cores are slow: --torch-threads {cores()}")
    else:
        yield Check("CPU", OK, found)


def _gpu() -> Iterator[Check]:
    import torch

    found, remarks = gpus()
    for name, size, bfloat16 in found:
        memory = f", {size / GIB:.1f} GiB" if size else ""
        yield Check("GPU", OK, f"{name}{memory}, bfloat16: {'yes' if bfloat16 else 'no'}")
    if not found and NVIDIA.exists():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        mend = "install a torch that fits the driver, or see that the job was given a GPU (CUDA_VISIBLE_DEVICES)"
        yield Check("GPU", WARN, f"an NVIDIA driver, but no GPU for torch; {built}. {remarks}".rstrip(". "), mend)
    elif not found:
        yield Check("GPU", OK, "none; the model runs on the CPU")


def _codec(codec: str) -> Iterator[Check]:
    import numpy as np
    import tifffile

    tile = _smooth_tile()
    decoded = tifffile.imread(BytesIO(_tiff(tile, codec)))
    error = int(np.abs(decoded.astype(int) - tile).max())
    if error > CODECS[codec]:
        mend = "pip install --force-reinstall imagecodecs"
        yield Check(f"codec {codec}", FAIL, f"decoded values are up to {error} from the true ones", mend)
    else:
        yield Check(f"codec {codec}", OK, "a tile was decoded")


def _smooth_tile() -> NDArray[np.uint8]:
    """RGB uint8 [64, 64, 3] that any codec can hold."""
    import numpy as np

    y, x = np.mgrid[:64, :64].astype(np.uint8) * np.uint8(3)
    return np.stack([y, x, y // 2 + x // 2], axis=2)


def _tiff(tile: NDArray[np.uint8], codec: str) -> bytes:
    import tifffile

    file = BytesIO()
    level = {"jpeg": 95}.get(codec)
    with tifffile.TiffWriter(file) as writer:
        writer.write(
            tile,
            tile=tile.shape[:2],
            photometric="rgb",
            compression=codec,
            metadata=None,
            compressionargs=None if level is None else {"level": level},
        )
    return file.getvalue()


def _openslide() -> Iterator[Check]:
    """OpenSlide really opens and decodes a slide."""
    import numpy as np

    from wsi_gradcam.geometry import Region
    from wsi_gradcam.slides import open_slide
    from wsi_gradcam.slides.openslide_reader import library_version

    tile = _smooth_tile()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tile.tif")
        path.write_bytes(_tiff(tile, "jpeg"))
        slide = open_slide(path, mpp=0.5, reader="openslide")
        try:
            error = int(np.abs(slide.read_level(0, Region(0, 0, *tile.shape[:2])).astype(int) - tile).max())
        finally:
            slide.close()
    mend = "pip install --force-reinstall openslide-bin"
    found = f"library {library_version()}, a slide was read"
    yield Check("OpenSlide", OK, found) if error <= CODECS["jpeg"] else Check("OpenSlide", FAIL, f"{found} wrong", mend)


def _choices() -> Iterator[Check]:
    """The folder that remembers what --engine auto chose."""
    from wsi_gradcam.cam.auto import cache_file
    from wsi_gradcam.io.local import write_atomic

    folder = cache_file().parent
    probe = folder / f"doctor-{uuid.uuid4().hex}"
    try:
        write_atomic(probe, b"")
        probe.unlink()
    except OSError as error:
        mend = "set XDG_CACHE_HOME to a folder that can be written, else --engine auto may choose anew in each run"
        yield Check("engine choices", WARN, one_line(error), mend)
    else:
        yield Check("engine choices", OK, str(folder))
