"""Where a slide's map is unsure: the spread of overlapping patches, stored by an audit, as channels of the slide."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from wsi_gradcam.audit.folder import AUDIT, AuditFolder
from wsi_gradcam.cam.names import METHOD_INFO
from wsi_gradcam.errors import NotShownError, ResultError, WsiGradcamError, one_line
from wsi_gradcam.results.channels import ChannelInfo
from wsi_gradcam.results.heatmap import COLOURS, HeatmapStore
from wsi_gradcam.viewer.inside import check_inside, check_tree
from wsi_gradcam.viewer.memo import Memo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from wsi_gradcam.geometry import Region
    from wsi_gradcam.results.heatmap import Channel
    from wsi_gradcam.results.slide import SlideResult
    from wsi_gradcam.viewer.archive import Archive, Shown

T = TypeVar("T")
SPREAD = "spread"
MOST_OPEN = 64
DAMAGED = "its spread cannot be read"


class SpreadImage:
    """The stored image, read as a heatmap is; it lies over the heatmap of the slide, level by level."""

    def __init__(self, slide: SlideResult, store: HeatmapStore, check: Callable[[], None]) -> None:
        """`check` raises where the image that was opened is not there any more.

        Raises:
            ResultError: it is of another heatmap.
        """
        about, plan = store.attributes["wsi_gradcam"], slide.plan
        known = (plan.run_digest, plan.slide_digest, plan.level_shapes)
        if (about["run"], about["slide"], store.shapes) != known:
            raise ResultError("the slide was explained anew since its audit; audit it again to see the spread")
        unit = METHOD_INFO[about["method"]].unit
        self.channels = tuple(_described(i, channel, unit) for i, channel in enumerate(store.channels))
        self.levels, self.stride_px = slide.levels, slide.stride_px
        self._store, self._check = store, check

    def read(self, channel: ChannelInfo, level: int, region: Region) -> NDArray[np.float32]:
        """Values of a channel, float32 [height, width]; 0 where fewer than two patches see a pixel.

        Raises:
            ResultError: it is damaged.
            NotShownError: the slide is being audited anew.
        """
        return _whole(lambda: self._store.read(level, channel.number, region), self._check)

    def read_coverage(self, level: int, region: Region) -> NDArray[np.uint8]:
        """Bits of each pixel: 2 where several patches see it. Raises as `read`."""
        return _whole(lambda: self._store.read_flags(level, region), self._check)


@dataclass(frozen=True)
class Spread:
    """The spread of a slide, for all that shows heatmaps.

    Attributes:
        key: of the slide.
        version: changes with the slide's and with the spread.
        digest: what its files say, part of addresses.
    """

    key: str
    version: str
    digest: str
    result: SpreadImage

    @property
    def is_kept(self) -> bool:
        """Whether what is read of it stays as it is."""
        return True


class Spreads:
    """Finds them; those looked at last stay open. Of slides that nobody looks at no file is touched."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._open = Memo(MOST_OPEN)

    def of(self, shown: Shown) -> Spread | None:
        """The spread of a slide; None where no audit has made one.

        Raises:
            WsiGradcamError: it is damaged, of another heatmap, or behind a link that leads out of OUT.
        """
        digest = self._digest(shown)
        return None if digest is None else self.with_digest(shown, digest)

    def with_digest(self, shown: Shown, digest: str) -> Spread:
        """The spread that an address means.

        Raises:
            NotShownError: another, or none, is there.
            WsiGradcamError: as `of`.
        """
        return self._open.get((shown.key, shown.version, digest), lambda: self._opened(shown, digest), lambda _: 1)

    def _opened(self, shown: Shown, digest: str) -> Spread:
        folder, slide = self._folder, shown.result

        def check() -> None:
            # An audit that is made anew removes the plan first, and writes the means last.
            if not folder.plan.is_file() or self._digest(shown) != digest:
                raise NotShownError("the slide is, or was, audited anew; load the page again")

        place = folder.spread(slide.id)
        check_tree(self._archive.out, place)
        image = _whole(lambda: SpreadImage(slide, HeatmapStore(place, read_only=True), check), check)
        return Spread(shown.key, f"{shown.version} {SPREAD} {digest}", digest, image)

    def _digest(self, shown: Shown) -> str | None:
        """Of the means, which are written when the image is whole."""
        slide_id = shown.result.id
        check_inside(self._archive.out, self._folder.spread_means(slide_id))
        means = self._folder.read_spread(slide_id)
        return None if means is None else hashlib.sha256(json.dumps(means, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def _folder(self) -> AuditFolder:
        return AuditFolder(self._archive.out / AUDIT)


def _whole(read: Callable[[], T], check: Callable[[], None]) -> T:
    """What is read, if the check holds afterwards: files that are being removed look as if nothing was written.

    Raises:
        ResultError: it is damaged.
    """
    try:
        return read()
    except WsiGradcamError:
        raise
    except Exception as error:  # zarr and its codecs raise all kinds
        raise ResultError(f"{DAMAGED} ({one_line(error)}); audit the run again with --overwrite") from error
    finally:
        check()


def _described(number: int, channel: Channel, unit: str) -> ChannelInfo:
    if not all(map(math.isfinite, (channel.minimum, channel.maximum, channel.start, channel.end))):
        raise ValueError(f"{channel.label}: a window that is no number")
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
