"""Pictures of slides and heatmaps, kept while there is room."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from wsi_gradcam.errors import NotShownError
from wsi_gradcam.slides import read_region, thumbnail
from wsi_gradcam.viewer.heat import Heat
from wsi_gradcam.viewer.memo import Memo
from wsi_gradcam.viewer.tiles import jpeg, slide_grid, slide_tile

if TYPE_CHECKING:
    from wsi_gradcam.slides import Slide
    from wsi_gradcam.viewer.archive import Archive, Shown
    from wsi_gradcam.viewer.heat import Layered
    from wsi_gradcam.viewer.slides_open import OpenSlides

TILE_BYTES = 128 << 20
THUMB_PX = 384
PATCH_QUALITY = 92


class Pictures:
    """Makes them; the encoded ones used last are kept."""

    def __init__(self, archive: Archive, slides: OpenSlides, tile_bytes: int = TILE_BYTES) -> None:
        self._archive, self._slides = archive, slides
        self._heat = Heat()
        self._kept = Memo(tile_bytes)

    def slide_tile(self, shown: Shown, level: int, row: int, column: int) -> bytes:
        """A tile of the slide, JPEG."""
        return self._of_slide(
            shown, ("slide", level, row, column), lambda s: slide_tile(s, slide_grid(s.info), level, row, column)
        )

    def heat_tile(self, shown: Layered, channel: int, level: int, row: int, column: int, smooth: bool) -> bytes:
        """A tile of a channel of a heatmap, or of its spread, PNG; see `Heat.tile`."""

        def make() -> bytes:
            return self._heat.tile(shown, channel, level, row, column, smooth)

        if not shown.is_kept:
            return make()
        return self._kept.get((shown.key, shown.version, smooth, channel, level, row, column), make, len)

    def patch(self, shown: Shown, number: int) -> bytes:
        """What the model saw of a patch, before its own transform, JPEG."""
        model = self._archive.result.run["model"]

        def make(slide: Slide) -> bytes:
            if not 0 <= number < shown.result.plan.patches:
                raise NotShownError(f"no patch {number}; there are {shown.result.plan.patches}, counted from 0")
            (y, x), (height, width) = shown.result.patch_yx(number), model["patch_px"]
            return jpeg(read_region(slide, y, x, height, width, model["mpp"]), PATCH_QUALITY)

        return self._of_slide(shown, ("patch", number), make)

    def thumb(self, shown: Shown) -> bytes:
        """The whole slide, no side longer than 384 px, JPEG."""
        return self._of_slide(shown, ("thumb",), lambda slide: jpeg(thumbnail(slide, 0.0, THUMB_PX).rgb))

    def _of_slide(self, shown: Shown, what: tuple[object, ...], make: Callable[[Slide], bytes]) -> bytes:
        def read() -> bytes:
            with self._slides.lent(f"{shown.key} {shown.version}", lambda: self._archive.open_slide(shown)) as slide:
                return make(slide)

        return self._kept.get((shown.key, shown.version, *what), read, len)
