"""Channels beside those of a heatmap: the spread of overlapping patches' maps, stored by an audit.

It shows where a slide's map is unsure, and is read as the heatmap is.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from wsi_gradcam.audit.folder import AUDIT, AuditFolder
from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.errors import NotShownError, ResultError, StoreError, WsiGradcamError, one_line
from wsi_gradcam.io.cache import Cache
from wsi_gradcam.results.display import ChannelInfo
from wsi_gradcam.results.heatmap import COLOURS, HeatmapStore
from wsi_gradcam.viewer.archive import check_inside, check_tree

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from wsi_gradcam.geometry import Region
    from wsi_gradcam.results.heatmap import Channel
    from wsi_gradcam.results.slide import SlideResult
    from wsi_gradcam.viewer.archive import Archive, ServedSlide

T = TypeVar("T")
SPREAD = "spread"
MAX_OPEN = 64
DAMAGED = "its spread cannot be read"


class SpreadImage:
    """The stored spread, read as a heatmap is; it aligns with the heatmap of the slide, level by level."""

    def __init__(self, slide: SlideResult, store: HeatmapStore, check: Callable[[], None]) -> None:
        """Describe the channels; `check` raises if the opened image has been replaced meanwhile.

        Raises:
            ResultError: the spread belongs to another heatmap.
        """
        about, plan = store.attributes["wsi_gradcam"], slide.plan
        known = (plan.run_digest, plan.slide_digest, plan.level_shapes)
        if (about["run"], about["slide"], store.shapes) != known:
            raise ResultError("the slide was explained anew since its audit; audit it again to see the spread")
        unit = METHOD_INFO[about["method"]].unit
        self.channels = tuple(_describe(i, channel, unit) for i, channel in enumerate(store.channels))
        self.levels, self.stride_px = slide.levels, slide.stride_px
        self._store, self._check = store, check

    def read(self, channel: ChannelInfo, level: int, region: Region) -> NDArray[np.float32]:
        """Return values of a channel, float32 [height, width]; 0 where fewer than two patches cover a pixel.

        Raises:
            ResultError: the image is damaged.
            NotShownError: the slide is being audited again.
        """
        return _checked(lambda: self._store.read(level, channel.number, region), self._check)

    def read_coverage(self, level: int, region: Region) -> NDArray[np.uint8]:
        """Return the bits of each pixel, 2 where several patches cover it. Raises as `read`."""
        return _checked(lambda: self._store.read_flags(level, region), self._check)


@dataclass(frozen=True)
class Spread:
    """The spread of a slide, to be shown as its heatmap is.

    Attributes:
        key: of the slide.
        version: changes with the slide's version and with the spread.
        digest: of the spread's files; part of addresses.
    """

    key: str
    version: str
    digest: str
    result: SpreadImage

    @property
    def is_final(self) -> bool:
        """Return True: a spread with this digest does not change."""
        return True


class Spreads:
    """Finds and opens spreads; those used last stay open. No file is touched for slides that nobody views."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._open: Cache[tuple[str, str, str], Spread] = Cache(MAX_OPEN)

    def of(self, slide: ServedSlide) -> Spread | None:
        """Return the spread of a slide; None if no audit has made one.

        Raises:
            WsiGradcamError: it is damaged, belongs to another heatmap, or a link leads out of OUT.
        """
        digest = self._digest(slide)
        return None if digest is None else self.with_digest(slide, digest)

    def with_digest(self, slide: ServedSlide, digest: str) -> Spread:
        """Return the spread of a slide with the digest in an address.

        Raises:
            NotShownError: the slide has another spread, or none.
            WsiGradcamError: as `of`.
        """
        return self._open.get((slide.key, slide.version, digest), lambda: self._read(slide, digest))

    def _read(self, slide: ServedSlide, digest: str) -> Spread:
        folder, result = self._folder, slide.result

        def check() -> None:
            # An audit that starts again removes the plan first, and writes the means last.
            if not folder.plan.is_file() or self._digest(slide) != digest:
                raise NotShownError("the slide is, or was, audited anew; load the page again")

        place = folder.spread(result.id)
        check_tree(self._archive.out, place)
        image = _checked(lambda: SpreadImage(result, HeatmapStore(place, read_only=True), check), check)
        return Spread(slide.key, f"{slide.version} {SPREAD} {digest}", digest, image)

    def _digest(self, slide: ServedSlide) -> str | None:
        """Return a digest of the means, which are written once the image is complete; None if there are none."""
        slide_id = slide.result.id
        check_inside(self._archive.out, self._folder.spread_means(slide_id))
        means = self._folder.read_spread(slide_id)
        return None if means is None else hashlib.sha256(json.dumps(means, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def _folder(self) -> AuditFolder:
        return AuditFolder(self._archive.out / AUDIT)


def _checked(read: Callable[[], T], check: Callable[[], None]) -> T:
    """Return what `read` returns if the check passes afterwards: files that are being removed look empty.

    Raises:
        ResultError: the files are damaged.
    """
    try:
        return read()
    except Exception as error:  # zarr and its codecs raise many kinds
        if isinstance(error, WsiGradcamError) and not isinstance(error, StoreError):
            raise
        raise ResultError(f"{DAMAGED} ({one_line(error)}); audit the run again with --overwrite") from error
    finally:
        check()


def _describe(number: int, channel: Channel, unit: str) -> ChannelInfo:
    if not all(map(math.isfinite, (channel.minimum, channel.maximum, channel.start, channel.end))):
        raise ValueError(f"{channel.label}: a window that is not finite")
    return ChannelInfo(
        number,
        channel.label,
        SPREAD,
        channel.label.removeprefix(f"{SPREAD}: "),
        unit,
        channel.minimum,
        channel.maximum,
        (channel.start, channel.end),
        COLOURS[number % len(COLOURS)],
    )
