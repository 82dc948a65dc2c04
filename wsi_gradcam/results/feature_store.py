"""The features of a slide's patches, `features.zarr`, and what a slide-level model's aggregator says about each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from wsi_gradcam.io.paths import StoragePathLike, storage_path
from wsi_gradcam.io.zarr_stores import ZarrGroup, write_group
from wsi_gradcam.results.manifest import digest_of, span_name
from wsi_gradcam.results.patch_store import OK

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from zarr.abc.store import Store

    from wsi_gradcam.results.manifest import Manifest, SlidePlan
    from wsi_gradcam.run.plan import RunPlan

OF_SPAN = ("features", "status")
OF_BAG = ("relevance", "attention", "coefficients", "logits")
BOXES = "boxes"
FEATURE_ROWS = 1 << 12  # in memory at once
KEPT_BOXES = 1 << 16  # in a chunk


@dataclass(frozen=True)
class BagShape:
    """The lengths of the axes of a slide-level model's arrays.

    Attributes:
        features: D, of a feature vector.
        methods: M, of bag methods.
        targets: T.
        heads: H, of attention; 0 if there is none.
        classes: K.
        maps: targets that are explained down to pixels: T or 0.
        precision: dtype of the features.
    """

    features: int
    methods: int
    targets: int
    heads: int
    classes: int
    maps: int
    precision: str = "float32"


class FeatureStore:
    """Reads and writes `features.zarr`: feature vectors of a slide's patches, and their contributions to its answer.

    Arrays: `features` [N, D] and `status` uint8 [N] (as in `PatchStore`), span by span; then, of the whole bag,
    float32: `relevance` [N, M, T] by bag method and target, `attention` [N, H] (weights whose sum is 1), `coefficients`
    [N, T, D], which weight a patch's features when it is explained down to its pixels, and `logits` [N, K], the answer
    to a bag of that patch alone. An unreadable patch is not part of the bag and has zeros. For features made elsewhere,
    there is also `boxes` float64 [N, 4]: y, x, height, width of each patch in level-0 px. `coefficients` exist if
    patches are explained down to their pixels.
    """

    def __init__(self, place: StoragePathLike, *, read_only: bool = False) -> None:
        self._place = storage_path(place)
        self._group = ZarrGroup(self._place, read_only=read_only)

    @classmethod
    def create(
        cls,
        place: StoragePathLike,
        count: int,
        span: int,
        shape: BagShape,
        attributes: dict[str, Any],
        boxes: NDArray[np.float64] | None = None,
        keep: bool = False,
    ) -> None:
        """Create a store for `count` patches, and keep their `boxes`.

        An existing one at `place` is replaced; with `keep`, all but its features, which belong to the same patches.
        """
        arrays: dict[str, tuple[tuple[int, ...], str, tuple[str, ...]]] = {
            "features": ((shape.features,), shape.precision, ("feature",)),
            "status": ((), "uint8", ()),
            "relevance": ((shape.methods, shape.targets), "float32", ("method", "target")),
            "attention": ((shape.heads,), "float32", ("head",)),
            "coefficients": ((shape.maps, shape.features), "float32", ("target", "feature")),
            "logits": ((shape.classes,), "float32", ("class",)),
        }

        def build(store: Store) -> None:
            group = zarr.create_group(store, attributes=attributes)
            for name, (rest, dtype, axes) in arrays.items():
                if 0 not in rest:
                    group.create_array(
                        name,
                        shape=(count, *rest),
                        chunks=(span, *rest),
                        dtype=dtype,
                        dimension_names=("patch", *axes),
                    )
            if boxes is not None:
                kept = group.create_array(
                    BOXES, shape=boxes.shape, chunks=(KEPT_BOXES, 4), dtype="float64", dimension_names=("patch", "box")
                )
                kept[:] = boxes

        write_group(storage_path(place), build, keep)

    def write(self, start: int, **arrays: NDArray[Any]) -> None:
        """Write rows of arrays by name, from patch `start` on.

        Raises:
            StoreError: the file system refuses.
        """
        with self._place.wrap_write_errors():
            for name, values in arrays.items():
                self._group.array(name)[start : start + len(values)] = values

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Read rows of an array."""
        return np.asarray(self._group.array(name)[start:stop])

    def arrays(self, *names: str) -> list[Any]:
        """Return arrays as they are stored, without reading anything yet."""
        return [self._group.array(name) for name in names]

    @property
    def attributes(self) -> dict[str, Any]:
        """What is known about the arrays: the encoder; names of methods, targets, classes and attention heads."""
        return dict(self._group.group.attrs)

    def columns(self, start: int, stop: int) -> list[NDArray[Any]]:
        """Read what `patches.parquet` has about the bag, in the order of its columns, [n] each."""
        relevance = self.read("relevance", start, stop)
        columns = list(relevance.reshape(len(relevance), -1).T)
        return columns + (list(self.read("attention", start, stop).T) if self.has("attention") else [])

    def has(self, name: str) -> bool:
        """Return whether there is such an array."""
        return name in self._group.group

    def digest(self, start: int, stop: int) -> str:
        """Return the sha256 of what a span wrote."""
        return digest_of(self.read(name, start, stop) for name in OF_SPAN)

    def digests(self) -> dict[str, str]:
        """Return the sha256 of each array, by its path from the slide's folder."""
        return {
            f"{self._place.name}/{name}": digest_of(self._parts(name))
            for name in (*OF_SPAN, *OF_BAG, BOXES)
            if self.has(name)
        }

    def _parts(self, name: str) -> Iterator[NDArray[Any]]:
        for start in range(0, self._group.array(name).shape[0], FEATURE_ROWS):
            yield self.read(name, start, start + FEATURE_ROWS)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D) of the features."""
        count, length = self._group.array("features").shape
        return int(count), int(length)


def encoding_problems(store: FeatureStore, manifest: Manifest, plan: SlidePlan) -> Iterator[str]:
    """Yield what is wrong with the features of a slide whose patches are not explained yet."""
    records = manifest.records("features")
    for number, (start, stop) in enumerate(plan.spans):
        record = records.get(span_name(number))
        if record is None or record.get("run") != plan.run_digest:
            yield f"features of span {number} are missing; run the same encode command again"
        elif store.digest(start, stop) != record.get("digest"):
            yield f"features of span {number} (patches {start} to {stop}) differ from what was computed"


class Bag:
    """The features of a slide's readable patches, as rows that are read on demand.

    Attributes:
        rows: numbers of the patches, int64 [n].
        shape: (n, D).
        dtype: type of the features.
    """

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self.rows = np.flatnonzero(store.read("status") == OK)
        self.shape = (len(self.rows), store.shape[1])
        self.dtype = store.read("features", 0, 0).dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> NDArray[Any]:
        rows = self.rows[part]
        if not len(rows):
            return np.zeros((0, self.shape[1]), np.float32)
        first = int(rows[0])
        return self._store.read("features", first, int(rows[-1]) + 1)[rows - first]


def create_store(
    run: RunPlan,
    place: StoragePathLike,
    patches: int,
    span: int,
    boxes: NDArray[np.float64] | None = None,
    keep: bool = False,
) -> None:
    """Create the store for a slide's features and what its aggregator says about them; see `FeatureStore.create`."""
    bag = run.facts.bag
    assert bag is not None
    shape = BagShape(
        bag.feature_dim,
        len(run.settings.bag_method),
        len(run.targets),
        len(bag.attention),
        len(run.facts.classes),
        len(run.targets) if run.maps else 0,
        run.settings.feature_precision,
    )
    about = {
        "encoder": bag.encoder,
        "encoding": run.encoding(),
        "bag_methods": list(run.settings.bag_method),
        "targets": [target.label for target in run.targets],
        "classes": list(run.facts.classes),
        "attention": list(bag.attention),
    }
    FeatureStore.create(place, patches, span, shape, about, boxes, keep)
