"""The stored plan of a slide: pure data that every other file of its results follows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from wsi_gradcam.errors import StoreError, one_line
from wsi_gradcam.geometry import Region, ceil_div, pyramid_shapes, tiles
from wsi_gradcam.results.heatmap import SHARD
from wsi_gradcam.tissue.stain import StainFit


@dataclass(frozen=True)
class SlidePlan:
    """The geometry of a slide's results, and the digests that say what they belong to.

    Attributes:
        slide_digest, run_digest: the slide file and the run that the results belong to.
        slide_px, slide_mpp: (height, width) of level 0 and its mpp (y, x).
        footprint: (height, width) of a patch in level-0 px.
        view: (y, x, height, width) in level-0 px from a patch's top left: the part of it that the network sees.
        patches: number of patches; `span` of them form a unit of work.
        stride: level-0 px per pixel of the heatmap's level 0.
        mask_digest: digest of the file that says which part is explained; "" without one.
        stain: normalises the stain of the patches, if the model needs that and there are patches.
    """

    slide_digest: str
    run_digest: str
    slide_px: tuple[int, int]
    slide_mpp: tuple[float, float]
    footprint: tuple[float, float]
    view: tuple[float, float, float, float]
    patches: int
    span: int
    stride: int
    mask_digest: str = ""
    stain: StainFit | None = None

    @property
    def heatmap_px(self) -> tuple[int, int]:
        """(height, width) of the heatmap's level 0."""
        return ceil_div(self.slide_px[0], self.stride), ceil_div(self.slide_px[1], self.stride)

    @property
    def level_shapes(self) -> list[tuple[int, int]]:
        """(height, width) of each level of the heatmap."""
        return pyramid_shapes(*self.heatmap_px)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first, end) patch of each span."""
        return [(i, min(i + self.span, self.patches)) for i in range(0, self.patches, self.span)]

    def blocks(self, level: int) -> list[Region]:
        """Return the blocks of a level, each exactly one shard."""
        return tiles(*self.level_shapes[level], SHARD)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return {**asdict(self), "stain": None if self.stain is None else self.stain.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SlidePlan:
        """Return the plan that `to_json` wrote.

        Raises:
            StoreError: another version wrote it, or it is damaged.
        """
        try:
            pairs = {key: tuple(values[key]) for key in ("slide_px", "slide_mpp", "footprint", "view")}
            stain = values.get("stain")
            return cls(**{**values, **pairs, "stain": None if stain is None else StainFit.from_json(stain)})
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"manifest/plan.json: not a plan of this version ({one_line(error)}); choose another --out, or "
                "recompute with --overwrite"
            ) from error
