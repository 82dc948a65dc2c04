"""The patches of a slide: `cams.zarr` (logits, CAMs at the layer's resolution) and `patches.parquet` (a table)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zarr

from wsi_gradcam.errors import StoreError, one_line
from wsi_gradcam.io.paths import StoragePathLike, storage_path
from wsi_gradcam.io.zarr_stores import ZarrGroup, telling_damage, write_group
from wsi_gradcam.models.spec import probabilities
from wsi_gradcam.results.manifest import digest_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from zarr.abc.store import Store

    from wsi_gradcam.results.manifest import SlidePlan
    from wsi_gradcam.run.plan import Map, RunPlan
    from wsi_gradcam.tissue import Patches


T = TypeVar("T", bound=np.generic)

PENDING, OK, UNREADABLE = 0, 1, 2
STATUS_NAMES = {OK: "ok", UNREADABLE: "unreadable"}  # in patches.parquet
KNOWN_ROWS = 1 << 16
SPANS_AT_ONCE = 16
SHARES = ("tissue", "pen", "glass")  # shares of a patch's area, known before it is explained
KNOWN = ("xy", *SHARES)


@dataclass(frozen=True)
class SpanData:
    """The results of a span of n patches.

    Attributes:
        logits: float32 [n, classes].
        cams: float32 [n, targets, h, w], raw and signed.
        status: uint8 [n], OK or UNREADABLE; an unreadable patch has zeros.
        blur: float32 [n], see `wsi_gradcam.tissue.quality.measure_blur`; NaN for an unreadable patch. Empty if an older
            version did not measure it.
    """

    logits: NDArray[np.float32]
    cams: NDArray[np.float32]
    status: NDArray[np.uint8]
    blur: NDArray[np.float32]

    def digest(self) -> str:
        """Return the sha256 of the values."""
        measured = (self.blur,) if len(self.blur) == len(self.status) else ()
        return digest_of((self.logits, self.cams, self.status, *measured))


class PatchStore:
    """Reads and writes a patch store.

    Arrays: `xy` int32 [N, 2] (x, y of the top left in level-0 px), `tissue`, `pen`, `glass`, `blur` float32 [N],
    `logits` float32 [N, classes], `cam` float32 [N, targets, h, w], `status` uint8 [N] (0 not done, 1 ok, 2
    unreadable).
    """

    def __init__(self, place: StoragePathLike, *, read_only: bool = False) -> None:
        self._place = storage_path(place)
        self._group = ZarrGroup(self._place, read_only=read_only)

    @classmethod
    def create(
        cls,
        place: StoragePathLike,
        patches: Patches,
        span: int,
        classes: int,
        targets: int,
        cam_shape: tuple[int, int],
        attributes: dict[str, Any],
    ) -> PatchStore:
        """Create a store for `patches`, with everything but the results; an existing store at `place` is replaced."""
        count = len(patches.yx)
        known = max(span, KNOWN_ROWS // span * span)  # patches in a chunk of the arrays that no span writes

        def build(store: Store) -> None:
            group = zarr.create_group(store, attributes=attributes)
            xy = group.create_array(
                "xy", shape=(count, 2), chunks=(known, 2), dtype="int32", dimension_names=("patch", "xy")
            )
            one: dict[str, Any] = {"shape": (count,), "dimension_names": ("patch",)}  # xarray needs the name
            shares = {n: group.create_array(n, chunks=(known,), dtype="float32", **one) for n in SHARES}
            if count:
                xy[:] = patches.yx[:, ::-1].astype(np.int32)
                for name, array in shares.items():
                    array[:] = getattr(patches, name)
            group.create_array("status", chunks=(span,), dtype="uint8", **one)
            group.create_array("blur", chunks=(span,), dtype="float32", fill_value=np.nan, **one)
            if classes:
                group.create_array(
                    "logits",
                    shape=(count, classes),
                    chunks=(span, classes),
                    dtype="float32",
                    dimension_names=("patch", "class"),
                )
            # One file per span, and in it one chunk per target: stitching reads one target at a time.
            if targets:
                group.create_array(
                    "cam",
                    shape=(count, targets, *cam_shape),
                    chunks=(span, 1, *cam_shape),
                    shards=(span, targets, *cam_shape),
                    dtype="float32",
                    dimension_names=("patch", "target", "y", "x"),
                )

        write_group(storage_path(place), build)
        return cls(place)

    @property
    def attributes(self) -> dict[str, Any]:
        """Meaning of the arrays: maps, classes, factors."""
        return dict(self._group.group.attrs.asdict())

    @property
    def patches(self) -> int:
        """The number of patches."""
        return int(self._group.array("xy").shape[0])

    @property
    def span(self) -> int:
        """The number of patches of a span."""
        return int(self._group.array("status").chunks[0])

    def yx(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Read level-0 px of the patches' top left corners, int64 [n, 2]."""
        return self._read("xy", slice(start, stop), np.int64)[:, ::-1]

    def write_span(self, start: int, data: SpanData) -> None:
        """Write a whole span, beginning with patch `start`.

        Raises:
            StoreError: the file system refuses.
        """
        part = slice(start, start + len(data.status))
        with self._place.wrap_write_errors():
            self._group.array("logits")[part] = data.logits
            if data.cams.shape[1]:
                self._group.array("cam")[part] = data.cams
            self._group.array("status")[part] = data.status
            self._group.array("blur")[part] = data.blur

    def read_span(self, start: int, stop: int) -> SpanData:
        """Read everything of the patches from `start` to `stop`."""
        part = slice(start, stop)
        logits = self._read("logits", part, np.float32)
        return SpanData(
            logits,
            self._read("cam", part, np.float32)
            if "cam" in self._group.group
            else np.zeros((len(logits), 0, 1, 1), "f4"),
            self._read("status", part, np.uint8),
            self._read("blur", part, np.float32) if "blur" in self._group.group else np.zeros(0, np.float32),
        )

    def digests(self, spans: Sequence[tuple[int, int]]) -> Iterator[str]:
        """Yield `SpanData.digest` of consecutive (first, end); several are read at a time."""
        for i in range(0, len(spans), SPANS_AT_ONCE):
            some = spans[i : i + SPANS_AT_ONCE]
            first = some[0][0]
            data = self.read_span(first, some[-1][1])
            for start, stop in some:
                part = slice(start - first, stop - first)
                yield SpanData(data.logits[part], data.cams[part], data.status[part], data.blur[part]).digest()

    def known_digests(self) -> dict[str, str]:
        """Return digests of the arrays that no span writes, by name."""
        return {name: digest_of(self._parts(name)) for name in KNOWN}

    def _parts(self, name: str) -> Iterator[NDArray[Any]]:
        array = self._group.array(name)
        for start in range(0, array.shape[0], KNOWN_ROWS):
            yield np.asarray(array[start : start + KNOWN_ROWS])

    def logits(self, start: int, stop: int) -> NDArray[np.float32]:
        """Read logits float32 [n, classes]."""
        return self._read("logits", slice(start, stop), np.float32)

    def cams(self, start: int, stop: int, target: int) -> NDArray[np.float32]:
        """Read the CAMs of one target, float32 [n, h, w]."""
        return self._read("cam", (slice(start, stop), target), np.float32)

    def status(self, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Read the status of patches, uint8 [n]."""
        return self._read("status", slice(start, stop), np.uint8)

    def share(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Read the share of each patch that is `tissue`, `pen` or `glass`, float32 [n]; NaN if it is not known."""
        return self._measured(name, slice(start, stop))

    def blur(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Read the blur of patches, float32 [n]; NaN if it is not known."""
        return self._measured("blur", slice(start, stop))

    def _measured(self, name: str, part: slice) -> NDArray[np.float32]:
        """Read what was measured on patches; NaN in stores of the first two formats, which had only tissue."""
        if name in self._group.group:
            return self._read(name, part, np.float32)
        return np.full(len(range(self.patches)[part]), np.nan, np.float32)

    def _read(self, name: str, selection: Any, dtype: type[T]) -> NDArray[T]:
        with telling_damage(self._place):
            return np.asarray(self._group.array(name)[selection], dtype)


ROWS = 1 << 16  # in a row group
Columns = Callable[[int, int], "list[NDArray[Any]]"]
"""(first patch, end) -> the values of further columns for the patches between."""


def write_table(
    place: StoragePathLike,
    run: RunPlan,
    plan: SlidePlan,
    store: PatchStore,
    causes: dict[int, str],
    slide: str = "",
    columns: Columns | None = None,
) -> None:
    """Write the table of the slide with the id `slide`; `causes` has the reasons for unreadable patches, by number.

    Columns: `y`, `x` (level-0 px of the top left), `tissue`, `pen`, `glass` (shares), `blur` (see
    `quality.measure_blur`), `status` (ok, unreadable), `cause`, `logit_CLASS`, `probability_CLASS`, `cam_mean_TARGET`,
    `cam_max_TARGET`; for further methods, `METHOD_mean_TARGET` and `METHOD_max_TARGET`. The CAM's statistics are in the
    heatmap's unit, which for Grad-CAM is logits: with global average pooling and a linear layer, cam_mean + bias =
    logit. For a slide-level model, logits and probabilities are its answers to a bag of that patch alone, and there are
    also `METHOD_relevance_TARGET` for each bag method, and `attention`, or `attention_CLASS`, from `columns`. Values of
    unreadable patches are null, including `blur`, which patches of a single colour do not have either. The schema's
    metadata `wsi_gradcam` is JSON that names the slide and the run of the patches, and gives their size, mpp and
    stride.
    """
    schema = _schema(run, {"slide": slide, **_geometry(run, plan), "run": plan.run_digest})
    with storage_path(place).atomic_writer() as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        step = max(1, ROWS // plan.span) * plan.span
        for start in range(0, plan.patches, step):
            writer.write_table(_rows(run, store, start, min(start + step, plan.patches), causes, schema, columns))


MAX_COLUMNS = 1 << 14
# Sizes of the file and of its content: numbers take at most 8 bytes, and texts are few and short.
SPARE_BYTES, ROW_BYTES, VALUE_BYTES = 1 << 26, 64, 16
TEXTS = ("status", "cause")
MAX_TEXT_BYTES = 1 << 28


class StoredTable:
    """The table of a slide, after checking what it claims to contain: `rows`, and no more than they need.

    Raises:
        StoreError: it is damaged, or not a table of that many patches.
        FileNotFoundError: there is none.
    """

    def __init__(self, place: StoragePathLike, rows: int) -> None:
        self._place = place = storage_path(place)
        data = place.read(SPARE_BYTES + rows * MAX_COLUMNS)
        try:
            self._file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=list(TEXTS))
            self._check(rows)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise error if isinstance(error, StoreError) else self._damaged(one_line(error)) from error

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the rows, with all columns or some."""
        try:
            return self._plain(self._file.read(columns, use_threads=False))
        except (pa.ArrowException, OSError) as error:
            raise error if isinstance(error, StoreError) else self._damaged(one_line(error)) from error

    def batches(self, rows: int) -> Iterator[pa.Table]:
        """Yield the rows in batches of this size."""
        for batch in self._file.iter_batches(rows, use_threads=False):
            yield self._plain(pa.Table.from_batches([batch]))

    def _check(self, rows: int) -> None:
        about, schema = self._file.metadata, self._file.schema_arrow
        wrong = [
            f.name for f in schema if f.name not in TEXTS and f.type not in (pa.int64(), pa.float32(), pa.float64())
        ]
        if about.num_rows != rows:
            raise StoreError(f"{self._place.name} has {about.num_rows:,} rows, expected {rows:,}")
        wrong += [name for name in ("y", "x", *TEXTS) if name not in schema.names]
        if len(schema) > MAX_COLUMNS or about.num_columns != len(schema) or wrong:
            raise self._damaged(f"{len(schema)} columns, not those of wsi_gradcam: {', '.join(wrong)[:80]}")
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
        size = sum(group.total_byte_size for group in groups)
        if size > SPARE_BYTES + rows * (ROW_BYTES + VALUE_BYTES * len(schema)):
            raise self._damaged(f"it unpacks to {size:,} bytes for {rows:,} patches")

    def _plain(self, table: pa.Table) -> pa.Table:
        """Return a table with its texts written out; each is stored once, and may be long."""
        for name in set(TEXTS) & set(table.column_names):
            texts = table.column(name)
            if not pa.types.is_dictionary(texts.type):
                continue
            size = sum(
                int(pc.sum(pc.take(pc.binary_length(part.dictionary), part.indices)).as_py() or 0)
                for part in texts.chunks
            )
            if size > MAX_TEXT_BYTES:
                raise self._damaged(f"{size:,} bytes of {name}")
            table = table.set_column(table.column_names.index(name), name, texts.cast(pa.string()))
        return table

    def _damaged(self, what: str) -> StoreError:
        return StoreError(f"{self._place}: damaged, {what}; recompute with --overwrite")


def column(run: RunPlan, shown: Map, kind: str) -> str:
    """Return the name of the column with a statistic of a map."""
    method = "cam" if shown.method == run.settings.method[0] else shown.method
    return f"{method}_{kind}_{shown.target.label}"


def bag_columns(run: RunPlan) -> list[str]:
    """Return the names of the columns that a slide-level model adds."""
    if run.facts.bag is None:
        return []
    relevance = [f"{method}_relevance_{t.label}" for method in run.settings.bag_method for t in run.targets]
    return relevance + [label.replace(": ", "_") for label in run.facts.bag.attention]


def _geometry(run: RunPlan, plan: SlidePlan) -> dict[str, Any]:
    """Return the values that place patches on the slide, as plain values; pairs are (y, x) or (height, width)."""
    stride, footprint = run.settings.stride(run.patch_px), plan.footprint
    scale = footprint[0] / run.patch_px[0], footprint[1] / run.patch_px[1]
    strides = {
        "patch_stride_px": list(stride),
        "patch_stride_level0_px": [stride[0] * scale[0], stride[1] * scale[1]],
    }
    return {
        "patch_px": list(run.patch_px),
        "patch_mpp": plan.patch_mpp(run.patch_px, run.mpp),
        "patch_level0_px": list(footprint),
        **({} if plan.features else strides),  # patches of features made elsewhere may be anywhere
        "slide_digest": plan.slide_digest,
        "slide_px": list(plan.slide_px),
        "slide_mpp": list(plan.slide_mpp),
    }


def _schema(run: RunPlan, origin: dict[str, Any]) -> pa.Schema:
    names = [f"{kind}_{label}" for kind in ("logit", "probability") for label in run.facts.classes]
    names += [column(run, m, kind) for kind in ("mean", "max") for m in run.maps]
    names += bag_columns(run)
    fields = [
        ("y", pa.int64()),
        ("x", pa.int64()),
        *((name, pa.float32()) for name in (*SHARES, "blur")),
        ("status", pa.string()),
        ("cause", pa.string()),
        *((name, pa.float32()) for name in names),
    ]
    units = {column(run, m, "*"): m.info.unit for m in run.maps}
    about = {"units": units, "y, x": "level-0 px of the patch's top left", **origin, **run.identity()}
    return pa.schema(fields, metadata={"wsi_gradcam": json.dumps(about, sort_keys=True)})


def _rows(
    run: RunPlan,
    store: PatchStore,
    start: int,
    stop: int,
    causes: dict[int, str],
    schema: pa.Schema,
    more: Columns | None,
) -> pa.Table:
    yx, status, logits = store.yx(start, stop), store.status(start, stop), store.logits(start, stop)
    missing = status != OK
    shares = probabilities(logits, run.facts.activation)
    columns: list[Any] = [yx[:, 0], yx[:, 1], *(store.share(name, start, stop) for name in SHARES)]
    blur = store.blur(start, stop)
    columns.append(pa.array(blur, pa.float32(), mask=np.isnan(blur)))
    columns.append(np.where(missing, STATUS_NAMES[UNREADABLE], STATUS_NAMES[OK]))
    columns.append([causes.get(i) for i in range(start, stop)])
    numbers = [*logits.T, *shares.T]
    cams = [store.cams(start, stop, i) * np.float32(m.factor) for i, m in enumerate(run.maps)]
    numbers += [cam.mean(axis=(1, 2)) for cam in cams] + [cam.max(axis=(1, 2)) for cam in cams]
    numbers += [] if more is None else more(start, stop)
    columns += [pa.array(values, pa.float32(), mask=missing) for values in numbers]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)
