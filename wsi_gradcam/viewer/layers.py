"""Channels besides those of a heatmap, read in the same way: the spread stored by an audit, and those of a second run.

The spread of overlapping patches' maps shows where a slide's map is uncertain. For a second run over the same slides,
there are its own channels, and the difference for each channel that both runs have.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from scipy.stats import rankdata

from wsi_gradcam.audit.plan import AUDIT, AuditFolder
from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.errors import NotShownError, ResultError, StoreError, WsiGradcamError, one_line
from wsi_gradcam.evidence import NOTHING, EvidenceFolder
from wsi_gradcam.evidence.labels import open_clusters
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.cache import Cache
from wsi_gradcam.results.display import PROBABILITY, ChannelInfo
from wsi_gradcam.results.heatmap import COLOURS, EXPLAINED, HeatmapStore
from wsi_gradcam.run.claims import EVIDENCE
from wsi_gradcam.viewer.archive import check_inside, check_tree

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.evidence.labels import Clusters
    from wsi_gradcam.results.heatmap import Channel
    from wsi_gradcam.results.slide import SlideResult
    from wsi_gradcam.viewer.archive import Archive, ServedSlide

T = TypeVar("T")
SPREAD = "spread"
MAX_OPEN = 64
DAMAGED = "its spread cannot be read"


class SpreadImage:
    """The stored spread, read like a heatmap; it aligns with the heatmap of the slide, level by level."""

    def __init__(self, slide: SlideResult, store: HeatmapStore, check: Callable[[], None]) -> None:
        """Describe the channels; `check` raises if the opened image has been replaced in the meantime.

        Raises:
            ResultError: the spread belongs to another heatmap.
        """
        about, plan = store.attributes["wsi_gradcam"], slide.plan
        known = (plan.run_digest, plan.slide_digest, plan.level_shapes)
        if (about["run"], about["slide"], store.shapes) != known:
            raise ResultError("the slide was explained again since its audit; audit it again to see the spread")
        unit = METHOD_INFO[about["method"]].unit
        self.channels = tuple(_describe(i, channel, unit) for i, channel in enumerate(store.channels))
        self.levels, self.stride_px = slide.levels, slide.stride_px
        self._store, self._check = store, check

    def read(self, channel: ChannelInfo, level: int, region: Region) -> NDArray[np.float32]:
        """Return values of a channel, float32 [height, width]; 0 where a pixel is covered by fewer than two patches.

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
    """The spread of a slide, to be shown like its heatmap.

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
    """Finds and opens spreads; those used most recently stay open. No file is touched for slides that nobody views."""

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
            # A restarted audit removes the plan first and writes the means last.
            if not folder.plan.is_file() or self._digest(slide) != digest:
                raise NotShownError("the slide is being, or was, audited again; reload the page")

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


CLASSES = "classes"


class ClassMap:
    """The most probable class of each pixel, read like a heatmap: its number plus its probability, which is below 1.

    Raises:
        ResultError: not all classes have a map of their probability.
    """

    def __init__(self, result: SlideResult) -> None:
        by_target = {channel.target: channel for channel in result.channels if channel.method == PROBABILITY}
        if len(result.classes) < 2 or not by_target.keys() >= set(result.classes):
            raise ResultError("the run has no maps of the probabilities of all classes")
        self._result, self._parts = result, [by_target[label] for label in result.classes]
        self.levels, self.stride_px = result.levels, result.stride_px
        end = float(len(self._parts))
        self.channels = (ChannelInfo(0, "predicted class", CLASSES, "", "class", 0.0, end, (0.0, end), COLOURS[0]),)

    def read(self, channel: ChannelInfo, level: int, region: Region) -> NDArray[np.float32]:
        """Return the class's number plus its probability in a region of a level, float32 [height, width]."""
        shares = np.stack([self._result.read(part, level, region) for part in self._parts])
        return np.asarray(shares.argmax(axis=0) + np.clip(shares.max(axis=0), 0, MOST), np.float32)

    def read_coverage(self, level: int, region: Region) -> NDArray[np.uint8]:
        """Return the coverage of the slide's heatmap."""
        return self._result.read_coverage(level, region)


MOST = np.float32(0.998)  # so that a probability of 1 is not the next class


@dataclass(frozen=True, eq=False)
class Predicted:
    """The most probable classes of a slide; `key`, `version` and `is_final` as of the slide."""

    key: str
    version: str
    is_final: bool
    result: ClassMap

    @classmethod
    def of(cls, slide: ServedSlide) -> Predicted:
        """Return those of a slide. Raises as `ClassMap`."""
        return cls(slide.key, f"{slide.version} {CLASSES}", slide.is_final, ClassMap(slide.result))


CLUSTERS = "clusters"
NO_CLUSTER = "of no cluster"
SEEN_LITTLE = np.float32(0.3)  # of what was looked at and belongs to no cluster


class ClusterMap:
    """The evidence cluster of each pixel, read like a heatmap: its number, starting at 0, plus how it is seen.

    What was looked at and belongs to no cluster has the number after the last cluster's.

    Raises:
        ResultError: its clusters are not numbered like ours.
    """

    def __init__(self, slide: SlideResult, labels: Clusters) -> None:
        self.kinds = sorted(labels.kinds, key=lambda kind: kind.number)
        count = len(self.kinds)
        if not count or [kind.number for kind in self.kinds] != list(range(1, count + 1)):
            raise ResultError("the clusters on the slide cannot be read; run `wsi-gradcam evidence` again")
        self.levels, self.stride_px, self._labels = slide.levels, slide.stride_px, labels
        end = float(count + 1)
        self.channels = (
            ChannelInfo(0, "clusters of the evidence", CLUSTERS, "", "class", 0.0, end, (0.0, end), COLOURS[0]),
        )

    def read(self, channel: ChannelInfo, level: int, region: Region) -> NDArray[np.float32]:
        """Return the cluster's number plus how it is seen in a region of a level, float32 [height, width]."""
        labels = self._labels.read(level, region)
        known = labels.astype(np.float32) - 1 + MOST
        return np.where(labels == NOTHING, np.float32(len(self.kinds)) + SEEN_LITTLE, known)

    def read_coverage(self, level: int, region: Region) -> NDArray[np.uint8]:
        """Return the pixels that were looked at, marked as explained."""
        return np.where(self._labels.read(level, region) > 0, np.uint8(EXPLAINED), np.uint8(0))


@dataclass(frozen=True, eq=False)
class Clustered:
    """The clusters on a slide, to be shown like its heatmap; `state` is that of the evidence."""

    key: str
    version: str
    state: str
    result: ClusterMap
    is_final: bool = True


class ClusterLayers:
    """Finds the clusters on slides; those used most recently stay open."""

    def __init__(self, archive: Archive, state: Callable[[], str]) -> None:
        """Use the evidence of an archive; its state is "" if there is none."""
        self._archive, self._state = archive, state
        self._open: Cache[tuple[str, str, str], Clustered] = Cache(MAX_OPEN)

    def of(self, slide: ServedSlide) -> Clustered | None:
        """Return the clusters on a slide; None if there are none, or they cannot be read."""
        state = self._state()
        try:
            return self.with_state(slide, state) if state else None
        except (WsiGradcamError, OSError):  # damage is reported by `validate`
            return None

    def with_state(self, slide: ServedSlide, state: str) -> Clustered:
        """Return the clusters on a slide with the state in an address.

        Raises:
            NotShownError: there are none, or they have changed.
            WsiGradcamError: they cannot be read.
        """
        if state != self._state():
            raise NotShownError("the evidence was sorted again; reload the page")
        return self._open.get((slide.key, slide.version, state), lambda: self._read(slide, state))

    def _read(self, slide: ServedSlide, state: str) -> Clustered:
        check_tree(self._archive.out, EvidenceFolder(self._archive.out / EVIDENCE).labels(slide.result.id))
        labels = open_clusters(slide.result)
        if labels is None:
            raise NotShownError("nothing of this slide was looked at for the evidence")
        image = ClusterMap(slide.result, labels)
        return Clustered(slide.key, f"{slide.version} {CLUSTERS} {state}", state, image)


DIFFERENCE, OTHER = "difference", "other"
COMPARED_PX = 1 << 16  # of the level on which runs are compared for the gallery


class Difference:
    """A second run's channels minus those of the first with the same labels, where both explained the slide.

    It is read like a heatmap, on the coarser of the two grids.

    Raises:
        ResultError: the runs do not explain the same slide, or have no channel in common.
    """

    def __init__(self, first: SlideResult, second: SlideResult) -> None:
        if (first.plan.slide_digest, first.size_px) != (second.plan.slide_digest, second.size_px):
            raise ResultError("the other run explained another file under this name")
        by_label = {channel.label: channel for channel in second.channels}
        self._pairs = [(channel, by_label[channel.label]) for channel in first.channels if channel.label in by_label]
        if not self._pairs:
            raise ResultError("the other run has no channel of the same name: other methods, or other classes")
        self._runs = (first, second)
        self.stride_px = max(first.stride_px, second.stride_px)
        self._offsets = tuple((self.stride_px // run.stride_px).bit_length() - 1 for run in self._runs)
        grids = [run.levels[offset:] for run, offset in zip(self._runs, self._offsets, strict=True)]
        self.levels = [mine for mine, other in zip(*grids, strict=False) if mine == other]
        if not self.levels:
            raise ResultError("the other run's heatmap has another stride, of which this one has no level")
        self.channels = tuple(_difference(i, *pair) for i, pair in enumerate(self._pairs))

    def read(self, channel: ChannelInfo, level: int, region: Region) -> NDArray[np.float32]:
        """Return the difference in a region of a level, float32 [height, width]."""
        mine, other = self.both(channel, level, region)
        return np.asarray(other - mine, np.float32)

    def both(self, channel: ChannelInfo, level: int, region: Region) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the values of both runs in a region of a level, float32 [height, width]."""
        mine, other = (
            run.read(one, level + offset, region)
            for run, one, offset in zip(self._runs, self._pairs[channel.number], self._offsets, strict=True)
        )
        return mine, other

    def read_coverage(self, level: int, region: Region) -> NDArray[np.uint8]:
        """Return the bits that each pixel has in both runs."""
        mine, other = (
            run.read_coverage(level + offset, region) for run, offset in zip(self._runs, self._offsets, strict=True)
        )
        return np.asarray(mine & other, np.uint8)


def _difference(number: int, mine: ChannelInfo, other: ChannelInfo) -> ChannelInfo:
    """Describe the difference of two channels; its window is half the wider one's, on both sides of 0."""
    end = max(abs(value) for channel in (mine, other) for value in channel.window) / 2
    return ChannelInfo(
        number,
        f"{DIFFERENCE}: {mine.label}",
        DIFFERENCE,
        mine.target,
        mine.unit,
        other.minimum - mine.maximum,
        other.maximum - mine.minimum,
        (0.0, end or 1.0),
        COLOURS[number % len(COLOURS)],
    )


@dataclass(frozen=True, eq=False)
class Compared:
    """A slide in two runs: the second run's results, and the difference.

    Attributes:
        slide: of the second run.
        version: of both; part of addresses.
        key: of the slide.
        is_final: whether both runs are done with it.
        result: the difference.
    """

    slide: ServedSlide
    version: str
    key: str
    is_final: bool
    result: Difference


class Comparison:
    """Finds slides in a second run by their ids."""

    def __init__(self, archive: Archive, other: Archive | None = None) -> None:
        self._archive, self._other = archive, other
        self._open: Cache[tuple[str, str, str], Compared] = Cache(MAX_OPEN)

    @cached_property
    def name(self) -> str:
        """The second run's name, different from the first run's; "" without a second run."""
        if self._other is None:
            return ""
        name = self._other.out.name
        return name if name != self._archive.out.name else f"{self._other.out.parent.name}/{name}"

    def of(self, slide: ServedSlide) -> Compared | None:
        """Return a slide in both runs; None without a second run, or if it has nothing for the slide.

        Raises:
            WsiGradcamError: they cannot be compared.
        """
        if self._other is None:
            return None
        try:
            other = self._other.find_by_id(slide.result.id)
        except NotShownError:
            return None
        version = hashlib.sha256(f"{slide.version} {other.version}".encode()).hexdigest()[:12]

        def compare() -> Compared:
            final = slide.is_final and other.is_final
            # With a version different from that of the first run's slide, as both share caches.
            own = replace(other, version=f"{OTHER} {version}")
            return Compared(own, version, slide.key, final, Difference(slide.result, other.result))

        return self._open.get((slide.key, slide.version, version), compare)

    def layer(self, slide: ServedSlide, kind: str, version: str) -> ServedSlide | Compared:
        """Return the layer named by an address: the second run's slide, or the difference.

        Raises:
            NotShownError: this version no longer exists.
            WsiGradcamError: as `of`.
        """
        found = self.of(slide)
        if found is None or found.version != version or kind not in (OTHER, DIFFERENCE):
            raise NotShownError("the slide has been explained anew; load the page again")
        return found.slide if kind == OTHER else found

    def scores(self, slide: ServedSlide) -> dict[str, float]:
        """Return how much the runs differ on a slide; empty if they cannot be compared.

        `maps` is 1 - Spearman's correlation of the explanations over the pixels that both explained, averaged over all
        common ones: 0 for the same order, 1 for none, 2 for the opposite. `probabilities` is their mean absolute
        difference.
        """
        found = self.of(slide)
        if found is None or not found.is_final:
            return {}
        difference = found.result
        last = len(difference.levels) - 1
        level = next((i for i, (h, w) in enumerate(difference.levels) if h * w <= COMPARED_PX), last)
        whole = Region(0, 0, *difference.levels[level])
        known = (difference.read_coverage(level, whole) & EXPLAINED) > 0
        maps, changes = [], []
        for channel in difference.channels:
            mine, other = (values[known].astype(np.float64) for values in difference.both(channel, level, whole))
            if channel.unit == PROBABILITY:
                changes.append(float(np.abs(other - mine).mean()) if len(mine) else math.nan)
            else:
                maps.append(1 - _rank_correlation(mine, other))
        named = {"maps": maps, "probabilities": changes}
        answered = {name: [value for value in values if math.isfinite(value)] for name, values in named.items()}
        return {name: float(np.mean(values)) for name, values in answered.items() if values}


def _rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return Spearman's correlation; NaN if one of the two is constant."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
