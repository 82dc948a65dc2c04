"""OME-Zarr images (OME-NGFF 0.4 and 0.5) as slides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from wsi_gradcam.errors import SlideError, SlideFormatError, SlideReadError, one_line
from wsi_gradcam.geometry import Region, ceil_div
from wsi_gradcam.slides.base import SlideInfo, check_mpp, levels_of, on_background

if TYPE_CHECKING:
    from numpy.typing import NDArray

WHITE = (255, 255, 255)
UM_PER_UNIT = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}
KEPT_IN_DIGEST = 1 << 22  # bytes of the coarsest level


class OmeZarrSlide:
    """A `Slide` in an OME-Zarr image of one picture in colour or gray."""

    def __init__(self, path: Path, mpp: tuple[float, float] | None = None, trust_objective: bool = False) -> None:
        self._path = path
        try:
            group = zarr.open_group(path, mode="r")
            self._scales = _multiscales(group)
            self._levels: list[Any] = [group[dataset["path"]] for dataset in self._scales["datasets"]]
            self._axes = [axis["name"] for axis in self._scales["axes"]]
            self._check()
            self._info = self._described(mpp)
        except SlideError as error:
            raise type(error)(f"{path}: {error}") from error
        except Exception as error:  # metadata may be anything
            raise SlideFormatError(
                f"{path}: not an OME-Zarr image that can be read ({one_line(error)[:200]}); expected OME-NGFF 0.4, 0.5"
            ) from error

    @property
    def info(self) -> SlideInfo:
        """What is known of the slide."""
        return self._info

    def read_level(self, level: int, region: Region) -> NDArray[np.uint8]:
        """Pixels of `region` of `level` as RGB uint8 [height, width, 3]; outside the slide: white.

        Raises:
            SlideReadError: a chunk cannot be decoded, or is missing where zarr would fill in black.
        """
        return on_background(region, self._info.levels[level], WHITE, partial(self._pixels, level))

    def close(self) -> None:
        """Nothing is held open."""

    def _pixels(self, level: int, region: Region) -> NDArray[np.uint8]:
        array = self._levels[level]
        where = f"{self._path}: level {level}, y {region.y}, x {region.x}, {region.height} x {region.width} px"
        wanted = {"y": slice(region.y, region.bottom), "x": slice(region.x, region.right), "c": slice(None)}
        try:
            values = np.asarray(array[tuple(wanted.get(axis, 0) for axis in self._axes)])
        except Exception as error:  # codecs raise many kinds
            raise SlideReadError(f"{where} cannot be decoded: {one_line(error)}") from error
        left = [axis for axis in self._axes if axis in wanted]
        values = np.moveaxis(values, left.index("c"), -1) if "c" in left else values[..., None]
        scaled = values if values.dtype == np.uint8 else (values.astype(np.uint32) + 128) // 257
        rgb = np.repeat(scaled, 3, axis=2) if scaled.shape[2] == 1 else scaled
        if any(not rgb[part.slices].any() for part in self._chunks(array, region)):
            raise SlideReadError(f"{where} has no data: a chunk is missing in the file, or black throughout")
        return rgb.astype(np.uint8, copy=False)

    def _chunks(self, array: Any, region: Region) -> list[Region]:
        """The parts of a region that lie in one chunk each, from the region's corner."""
        height, width = (array.chunks[self._axes.index(axis)] for axis in "yx")
        rows = range(region.y // height, ceil_div(region.bottom, height))
        columns = range(region.x // width, ceil_div(region.right, width))
        parts = (Region(r * height, c * width, height, width).intersect(region) for r in rows for c in columns)
        return [Region(part.y - region.y, part.x - region.x, part.height, part.width) for part in parts]

    def _check(self) -> None:
        array = self._levels[0]
        sizes = dict(zip(self._axes, array.shape, strict=True))
        if not {"y", "x"} <= sizes.keys() or any(sizes[axis] != 1 for axis in sizes.keys() - {"y", "x", "c"}):
            raise SlideFormatError(f"an image of axes {sizes}, expected one picture of y, x and colours")
        if sizes.get("c", 1) not in (1, 3) or array.dtype not in (np.uint8, np.uint16):
            raise SlideFormatError(
                f"{sizes.get('c', 1)} channels of {array.dtype}, expected RGB or gray of 8 or 16 bits: stains of "
                "fluorescence are no colours, and heatmaps no slides"
            )

    def _described(self, mpp: tuple[float, float] | None) -> SlideInfo:
        y, x = self._axes.index("y"), self._axes.index("x")
        found, problem = (mpp, "") if mpp is not None else self._mpp()
        return SlideInfo(
            path=str(self._path),
            levels=levels_of([(level.shape[y], level.shape[x]) for level in self._levels]),
            mpp=found,
            mpp_problem=problem,
            vendor="ome-zarr",
            background=WHITE,
            bounds=None,
            digest=self._digest(),
        )

    def _mpp(self) -> tuple[tuple[float, float] | None, str]:
        values = []
        for name in "yx":
            number = self._axes.index(name)
            unit = self._scales["axes"][number].get("unit")
            if unit not in UM_PER_UNIT:
                return None, f"axis {name} has unit {unit!r}; give the micrometres per pixel with --mpp"
            steps = [t["scale"][number] for t in _scalings(self._scales, self._scales["datasets"][0])]
            value = float(np.prod(steps)) * UM_PER_UNIT[unit]
            if problem := check_mpp(value, f"the scale of axis {name}"):
                return None, problem
            values.append(value)
        return (values[0], values[1]), ""

    def _digest(self) -> str:
        """Of the metadata and the beginning of the coarsest level, which stands for the rest as in OpenSlide's hash."""
        digest = hashlib.sha256(json.dumps(self._scales, sort_keys=True, default=str).encode())
        for level in self._levels:
            digest.update(f"{level.shape} {level.dtype} {level.chunks}".encode())
        coarsest = self._levels[-1]
        rows = max(1, KEPT_IN_DIGEST // max(1, coarsest.nbytes // coarsest.shape[self._axes.index("y")]))
        digest.update(
            np.asarray(coarsest[tuple(slice(rows) if a == "y" else slice(None) for a in self._axes)]).tobytes()
        )
        return digest.hexdigest()[:32]


def _multiscales(group: Any) -> dict[str, Any]:
    attributes: Mapping[str, Any] = group.attrs.asdict()
    found = attributes.get("ome", attributes).get("multiscales")
    if not found:
        raise SlideFormatError("a Zarr group without multiscales, expected an OME-Zarr image")
    scales: dict[str, Any] = found[0]
    return scales


def _scalings(scales: Mapping[str, Any], dataset: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    both = [*dataset.get("coordinateTransformations", ()), *scales.get("coordinateTransformations", ())]
    return [transform for transform in both if transform.get("type") == "scale"]
