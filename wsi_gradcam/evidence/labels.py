"""The label image of a slide: which kind of evidence lies where, on the grid of the slide's heatmap, as OME-NGFF 0.5.

Where patches overlap a pixel is of the one in whose middle it lies most.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.errors import StoreError
from wsi_gradcam.evidence import COLOURS, NOTHING, EvidenceFolder
from wsi_gradcam.evidence.clusters import SIDES
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.zarr_stores import MADE_BY_US, ZarrGroup, telling_damage, write_labels_group
from wsi_gradcam.results.heatmap import CHUNK, SHARD, touching
from wsi_gradcam.results.run_files import folder_name
from wsi_gradcam.run.claims import EVIDENCE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.plan import Arrays
    from wsi_gradcam.evidence import EvidencePlan
    from wsi_gradcam.evidence.clusters import Side
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.results.manifest import SlidePlan
    from wsi_gradcam.results.slide import SlideResult

    Labels = NDArray[np.uint8]


@dataclass(frozen=True)
class Label:
    """A kind as a label image tells of it."""

    number: int
    name: str
    side: Side
    colour: str

    @property
    def title(self) -> str:
        """What it is called where a class has a name: that which was given, or its number.

        >>> Label(3, "", "for", "009E73").title, Label(3, "mitoses", "for", "009E73").title
        ('cluster 3', 'mitoses')
        """
        return self.name or f"cluster {self.number}"


def is_whole(place: StoragePath, plan: EvidencePlan) -> bool:
    """Return whether the label image of these kinds is there."""
    return bool(_attributes(place).get("wsi_gradcam", {}).get("evidence") == plan.cells_digest)


def name_labels(place: StoragePath, plan: EvidencePlan, slide: str, slide_plan: SlidePlan) -> None:
    """Write the names of kinds into a label image, if they have changed."""
    metadata = _metadata(slide, slide_plan, labels_of(plan))
    if _attributes(place).get("ome") != metadata:
        with place.wrap_write_errors():
            ZarrGroup(place).group.attrs["ome"] = metadata


def write_labels(
    place: StoragePath, plan: EvidencePlan, slide: str, slide_plan: SlidePlan, pieces: Sequence[Arrays]
) -> None:
    """Write the label image of a slide, from its patches whose cells are sorted."""
    about = {"run": plan.run_digest, "slide": slide_plan.slide_digest, "target": plan.target.label}
    attributes = {"ome": _metadata(slide, slide_plan, labels_of(plan)), "wsi_gradcam": about}
    write_labels_group(place, slide_plan.level_shapes, CHUNK, SHARD, attributes)
    _paint(place, plan, slide_plan, pieces)
    with place.wrap_write_errors():
        ZarrGroup(place).group.attrs["wsi_gradcam"] = {"evidence": plan.cells_digest, **about}  # the last: it is whole


def labels_of(plan: EvidencePlan) -> list[Label]:
    """Return the labels of a plan's kinds."""
    assert plan.kinds is not None
    return [
        Label(i + 1, plan.names.get(i + 1, ""), side, COLOURS[i % len(COLOURS)])
        for i, side in enumerate(plan.kinds.sides)
    ]


def _attributes(place: StoragePath) -> dict[str, Any]:
    with suppress(FileNotFoundError, StoreError):
        return dict(ZarrGroup(place, read_only=True).group.attrs.asdict())
    return {}


def _metadata(slide: str, plan: SlidePlan, labels: Sequence[Label]) -> dict[str, Any]:
    scale = (plan.slide_mpp[0] * plan.stride, plan.slide_mpp[1] * plan.stride)
    depth = len(folder_name(slide).split("/")) + 2  # from OUT/evidence/SLIDE/clusters.ome.zarr up to OUT
    colours = [{"label-value": one.number, "rgba": [*bytes.fromhex(one.colour), 255]} for one in labels]
    properties = [
        {"label-value": one.number, "cluster": one.number, "name": one.name, "side": one.side} for one in labels
    ]
    return {
        "version": "0.5",
        "multiscales": [
            {
                "name": "clusters",
                "axes": [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"],
                "datasets": [
                    {
                        "path": str(level),
                        "coordinateTransformations": [{"type": "scale", "scale": [s * 2**level for s in scale]}],
                    }
                    for level in range(len(plan.level_shapes))
                ],
            }
        ],
        "image-label": {
            "colors": [*colours, {"label-value": NOTHING, "rgba": [160, 160, 160, 255]}],
            "properties": [*properties, {"label-value": NOTHING, "cluster": 0, "name": "of no cluster", "side": ""}],
            "source": {"image": "../" * depth + f"{folder_name(slide)}/heatmap.ome.zarr"},
        },
    }


def _paint(place: StoragePath, plan: EvidencePlan, slide_plan: SlidePlan, pieces: Sequence[Arrays]) -> None:
    """Write all levels, block by block; blocks without patches are left empty."""
    group = ZarrGroup(place)
    cells = np.concatenate([one["cells/kinds"] for one in pieces])
    yx, sizes = (np.concatenate(values) for values in zip(*(_seen(one, slide_plan) for one in pieces), strict=True))
    with place.wrap_write_errors():
        for block in slide_plan.blocks(0):
            inside = touching(yx, sizes, slide_plan.stride, block)
            if len(inside):
                labels = painted(slide_plan.stride, block, yx[inside], sizes[inside], cells[inside])
                group.array("0")[block.slices] = labels
        for level in range(1, len(slide_plan.level_shapes)):
            finer = slide_plan.level_shapes[level - 1]
            for block in slide_plan.blocks(level):
                source = Region(block.y * 2, block.x * 2, block.height * 2, block.width * 2)
                labels = coarsened(
                    np.asarray(group.array(str(level - 1))[source.intersect(Region(0, 0, *finer)).slices])
                )
                if labels.any():
                    group.array(str(level))[block.slices] = labels


def _seen(piece: Arrays, plan: SlidePlan) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the corner (y, x) and the size (height, width) of what is seen of each patch, level-0 px [n, 2] each."""
    if "patch/box" in piece:
        return piece["patch/box"][:, :2], piece["patch/box"][:, 2:]
    yx = piece["patch/yx"] + np.array(plan.view[:2])
    return yx, np.broadcast_to(plan.view[2:], yx.shape)


def painted(stride: int, block: Region, yx: NDArray[Any], sizes: NDArray[Any], cells: Labels) -> Labels:
    """Return the label [height, width] of each pixel of a block: of the patch in whose middle it lies most.

    A pixel takes the cell that its centre lies in; a cell that is of no kind is `NOTHING`, and 0 is where no patch is.

    Args:
        stride: level-0 px per pixel.
        yx, sizes: [n, 2] in level-0 px of what the network sees of each patch.
        cells: [n, h, w] labels.
    """
    best = np.zeros((block.height, block.width), np.float32)
    found = np.zeros((block.height, block.width), np.uint8)
    shape, offset, length = cells.shape[1:], (block.y, block.x), (block.height, block.width)
    for start, size, own in zip(yx.tolist(), sizes.tolist(), cells, strict=True):
        axes = [_pixels(stride, start[i], size[i], shape[i], offset[i], length[i]) for i in (0, 1)]
        (rows, row_cells, row_weights), (columns, column_cells, column_weights) = axes
        weights = row_weights[:, None] * column_weights[None]
        before = best[rows, columns]
        nearer = weights > before
        before[nearer] = weights[nearer]
        found[rows, columns][nearer] = own[row_cells[:, None], column_cells[None]][nearer]
    return found


def _pixels(
    stride: int, start: float, size: float, cells: int, offset: int, length: int
) -> tuple[slice, NDArray[np.int64], NDArray[np.float32]]:
    """Return the pixels of a block that a patch covers along an axis, the cell of each, and how deep inside it is."""
    first = max(int(np.ceil(start / stride - 0.5)), offset)
    last = min(int(np.ceil((start + size) / stride - 0.5)), offset + length)
    place = ((np.arange(first, max(first, last)) + 0.5) * stride - start) / size
    inside = slice(first - offset, max(first, last) - offset)
    weights = np.maximum(np.sin(np.pi * place) ** 2, 1e-6).astype(np.float32)
    return inside, np.minimum((place * cells).astype(np.int64), cells - 1), weights


def coarsened(labels: Labels) -> Labels:
    """Return the half-size image: of each 2 x 2 the first label of a kind, so that none is lost from view."""
    padded = np.pad(labels, [(0, side % 2) for side in labels.shape])
    found = np.zeros_like(padded[::2, ::2])
    for wanted in (NOTHING, 0):
        for y, x in ((1, 1), (1, 0), (0, 1), (0, 0)):
            own = padded[y::2, x::2]
            found = np.where((own == NOTHING) if wanted else (own > 0) & (own < NOTHING), own, found)
    return found


@dataclass(frozen=True, eq=False)
class Clusters:
    """The label image of a slide, opened for reading.

    Attributes:
        kinds: that it tells of.
        shapes: [h, w] of each level, those of the slide's heatmap.
    """

    kinds: tuple[Label, ...]
    shapes: list[tuple[int, int]]
    _group: ZarrGroup
    _place: StoragePath

    def read(self, level: int, region: Region) -> Labels:
        """Return labels uint8 [height, width] of a region of a level: 0 not looked at, 255 of no kind.

        Raises:
            StoreError: it is damaged.
        """
        array = self._group.array(str(level))
        if array.dtype != "uint8" or (array.chunks, array.shards) != ((CHUNK, CHUNK), (SHARD, SHARD)):
            raise StoreError(f"{self._place}/{level}: not a label image of ours; {MADE_BY_US}")
        if array.shape != self.shapes[level]:
            raise StoreError(f"{self._place}/{level}: {array.shape} px, expected {self.shapes[level]}; {MADE_BY_US}")
        with telling_damage(self._place):
            return np.asarray(array[region.slices], np.uint8)

    def at(self, yx: NDArray[Any]) -> Labels:
        """Return the labels uint8 [n] of pixels (y, x) [n, 2] of the finest level; 0 outside of it."""
        found, pixels = np.zeros(len(yx), np.uint8), np.asarray(yx, np.int64)
        known = np.all((pixels >= 0) & (pixels < self.shapes[0]), axis=1)
        tiles, member = np.unique(pixels[known] // CHUNK, axis=0, return_inverse=True)
        rows = np.flatnonzero(known)
        for number, (y, x) in enumerate((tiles * CHUNK).tolist()):
            tile = self.read(0, Region(y, x, CHUNK, CHUNK).intersect(Region(0, 0, *self.shapes[0])))
            own = rows[member.ravel() == number]
            found[own] = tile[pixels[own, 0] - y, pixels[own, 1] - x]
        return found


def open_clusters(slide: SlideResult) -> Clusters | None:
    """Return the label image of a slide's kinds of evidence; None where there is none, or it is of other results.

    Raises:
        StoreError: it is damaged.
    """
    return read_clusters(EvidenceFolder(slide.out / EVIDENCE).labels(slide.id), slide.plan)


def read_clusters(place: StoragePath, plan: SlidePlan) -> Clusters | None:
    """Return the label image at a place of a slide with this plan; None and raises as `open_clusters`."""
    try:
        group = ZarrGroup(place, read_only=True)
    except FileNotFoundError:
        return None
    attributes: Any = group.group.attrs.asdict()
    with telling_damage(place):
        about = dict(attributes["wsi_gradcam"])
        if "evidence" not in about or about["run"] != plan.run_digest:
            return None
        found = dict(attributes["ome"])["image-label"]
        colours = {one["label-value"]: bytes(one["rgba"][:3]).hex().upper() for one in found["colors"]}
        kinds = tuple(
            Label(int(one["label-value"]), str(one["name"]), one["side"], colours[one["label-value"]])
            for one in found["properties"]
            if 0 < one["label-value"] < NOTHING and one["side"] in SIDES
        )
    return Clusters(kinds, list(plan.level_shapes), group, place)
