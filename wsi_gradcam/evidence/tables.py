"""What is known of a slide, made by workers: its sample, its tables of places and patches, and its sums.

The client reads the sums: a few numbers for each slide and kind, and the patches that could be shown of it. How many
patches a slide has in the sample is all that it knows of them.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.audit.archive import Annotated, ReadablePatches, annotated_slide, ground_of, sample_columns
from wsi_gradcam.audit.plan import Arrays, patch_seeds, read_arrays, write_arrays
from wsi_gradcam.errors import ResumeError
from wsi_gradcam.evidence import PIECE, DrawnPatches, EvidenceFolder, Shown, drawn_patches, sample_digest
from wsi_gradcam.evidence.clusters import SIDES, shown_of
from wsi_gradcam.evidence.labels import is_whole, name_labels, write_labels
from wsi_gradcam.io.paths import storage_path
from wsi_gradcam.results.manifest import Manifest
from wsi_gradcam.results.marks import Marks
from wsi_gradcam.results.patch_store import StoredTable
from wsi_gradcam.results.run_files import RunFolder
from wsi_gradcam.run.claims import EVIDENCE
from wsi_gradcam.run.types import Planned

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.plan import AuditSettings
    from wsi_gradcam.evidence import EvidencePlan
    from wsi_gradcam.evidence.clusters import Kinds
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.results.manifest import SlidePlan
    from wsi_gradcam.results.run_files import SlideFolder
    from wsi_gradcam.run.context import Context

    Floats = NDArray[np.float64]

COVERED = 40  # patches in which a kind is covered: enough for a paired test, see `audit.findings.ENOUGH`
EXAMPLES = 6  # typical ones of a kind, and as many extremes
JOINED = 4096  # slides whose sums are kept each for itself
EVENLY = 0.5  # of the draws go to any cell, the others to where the contributions are
UNITS = 1024  # sums of a slide, where patches are counted for themselves
_MOST = {"covered": COVERED, "extreme": EXAMPLES, "typical": 2 * EXAMPLES}  # candidates of a kind


def draw_slide(context: Context[Any], entry: SlideEntry) -> Planned:
    """Draw the patches of a slide from its table and store which they are, unless that was done."""
    plan: EvidencePlan = context.workload.plan
    folder = EvidenceFolder(plan.run.out / EVIDENCE)
    if not folder.batch(entry.id, plan.sample_digest, 0).is_file():
        _draw(plan, entry.id, context.folder(entry)).write(folder, entry.id, plan.sample_digest)
    count = len(drawn_patches(folder, entry.id, plan.sample_digest))
    return Planned(count, count, list(range(-(-count // PIECE))), [])


def _draw(plan: EvidencePlan, slide: str, folder: SlideFolder) -> DrawnPatches:
    share, classes = plan.shares[slide], plan.run.facts.classes
    table = StoredTable(folder.table, stored_plan(folder, plan).patches)
    if share.like:
        there = EvidenceFolder(RunFolder(storage_path(plan.against[0])).place / EVIDENCE)
        return drawn_patches(there, slide, sample_digest(share.like)).shared(table.read(["y", "x", "status"]))
    if plan.unit == "slide":
        return _draw_relevant(plan, slide, table)
    patches = ReadablePatches.of(table.read(sample_columns(classes)), classes)
    found = patches.draw(slide, patches.predicted, share.patches, plan.settings.seed, share.stands_for)
    return DrawnPatches.of(found.patches, found.yx, found.weights)


def _draw_relevant(plan: EvidencePlan, slide: str, table: StoredTable) -> DrawnPatches:
    """Return patches of a slide-level model's slide: all, or more of those that contribute much; see `draw_cells`."""
    share, classes = plan.shares[slide], plan.run.facts.classes
    column = f"{plan.run.settings.bag_method[0]}_relevance_{plan.target.label}"
    columns = table.read([*sample_columns(classes), column])
    patches = ReadablePatches.of(columns, classes)
    rows, weights = np.arange(len(patches.numbers)), np.ones(len(patches.numbers))
    if len(rows) > share.patches:
        relevance = columns.column(column).to_numpy(zero_copy_only=False)[patches.numbers].astype(np.float64)
        _, rows, weights = draw_cells(relevance[None], patch_seeds(plan.settings.seed, slide, [0]), share.patches)
    return DrawnPatches(patches.numbers[rows], patches.yx[rows], weights * share.stands_for)


def draw_cells(values: Floats, seeds: Sequence[int], cells: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """Return (patch, cell, weight) of the cells that are drawn from each patch, `values` [P, n] being contributions.

    `cells` draws of a patch, half of them in proportion to the size of the contribution (all evenly where there is
    none). A cell that is drawn k times weighs k / (cells * its probability): unbiased (Hansen and Hurwitz 1943).
    """
    rows, chosen, weights = [], [], []
    for row, (own, seed) in enumerate(zip(np.abs(values), seeds, strict=True)):
        size, total = len(own), float(own.sum())
        even = np.full(size, 1 / size)
        share = EVENLY * even + (1 - EVENLY) * (own / total if total > 0 else even)
        drawn = np.random.default_rng(seed).choice(size, cells, p=share / share.sum())
        unique, times = np.unique(drawn, return_counts=True)
        rows.append(np.full(len(unique), row))
        chosen.append(unique)
        weights.append(times / (cells * share[unique]))
    return np.concatenate(rows), np.concatenate(chosen), np.concatenate(weights)


def stored_plan(folder: SlideFolder, plan: EvidencePlan) -> SlidePlan:
    """Return the plan of a slide's results; raises a ResumeError where they are of another run by now."""
    found = Manifest(folder.manifest).plan()
    if found is None or found.run_digest != plan.run_digest:
        raise ResumeError(f"{folder.place}: another run has begun there meanwhile; try again when it is finished")
    return found


def sort_slide(context: Context[Any], entry: SlideEntry) -> None:
    """Write what kinds are on a slide, unless that was done; its pieces have been measured."""
    plan: EvidencePlan = context.workload.plan
    slide_folder = context.folder(entry)
    slide_plan = stored_plan(slide_folder, plan)
    folder = EvidenceFolder(plan.run.out / EVIDENCE)
    place = folder.batch(entry.id, plan.sums_digest, 0)
    if not (place.is_file() and folder.places(entry.id).is_file()):
        given = Given.of(plan.settings.drawings(), plan.run.out, entry, slide_plan, slide_folder)
        write_arrays(place, write_places(folder, plan, entry.id, slide_plan, given))
    labels = folder.labels(entry.id)
    if plan.settings.skip_labels:
        folder.forget_labels(entry.id)
    elif is_whole(labels, plan) and folder.patches(entry.id).is_file():
        name_labels(labels, plan, entry.id, slide_plan)
    else:
        count = 1 if plan.unit == "slide" else plan.pieces(entry.id)
        pieces = [read_arrays(folder.batch(entry.id, plan.cells_digest, i)) for i in range(count)]
        folder.patches(entry.id).write(_patches_table(pieces))
        write_labels(labels, plan, entry.id, slide_plan, pieces)


def measured(folder: EvidenceFolder, plan: EvidencePlan, slide: str) -> Iterator[Arrays]:
    """Yield the pieces of a slide that have places."""
    for number in range(-(-plan.counts[slide] // PIECE)):
        arrays = read_arrays(folder.batch(slide, plan.digest, number))
        if len(arrays["patch/number"]):
            yield arrays


def weights_of(arrays: Arrays) -> Floats:
    """Return how many places of the archive each place of a piece stands for."""
    weights: Floats = arrays["place/weight"] * arrays["patch/weight"][arrays["place/patch"]]
    return weights


def write_places(folder: EvidenceFolder, plan: EvidencePlan, slide: str, slide_plan: SlidePlan, given: Given) -> Arrays:
    """Write a row a place: patch, centre in level-0 px, kind (0 for none), contribution, weight; return the sums."""
    assert plan.kinds is not None
    sums = _Sums(plan, slide)
    table = Table()
    for arrays in measured(folder, plan, slide):
        features, values = arrays["place/features"], arrays["place/value"]
        kinds = plan.kinds.sort(features, values, shown_of(arrays))
        shares = given.shares(arrays, slide_plan.view, plan.grid)
        sums.add(arrays, kinds, likeness_of(plan.kinds, features, kinds), shares)
        patch = arrays["place/patch"]
        y, x = centres(arrays, slide_plan.view, plan.grid).T
        table.add(
            patch=arrays["patch/number"][patch],
            y=y,
            x=x,
            cluster=kinds + 1,
            contribution=values,
            weight=weights_of(arrays),
        )
    folder.places(slide).write(table.finished())
    return sums.arrays()


def centres(arrays: Arrays, view: tuple[float, float, float, float], grid: tuple[int, int]) -> Floats:
    """Return the centres [n, 2] of places, (y, x) in level-0 px."""
    cell = np.stack(np.divmod(arrays["place/cell"], grid[1]), axis=1)
    corner = arrays["patch/yx"][arrays["place/patch"]] + np.array(view[:2])
    found: Floats = corner + (cell + 0.5) * np.array(view[2:]) / np.array(grid)
    return found


def likeness_of(kinds: Kinds, features: NDArray[Any], sorted_as: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the cosine [n] of places and the centre of their kind; 0 for those of none."""
    likeness = np.take_along_axis(kinds.likeness(features), np.maximum(sorted_as, 0)[:, None], axis=1)[:, 0]
    return np.where(sorted_as >= 0, likeness, 0).astype(np.float32)


class Table:
    """A table in Parquet that grows piece by piece."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._writer: Any = None

    def add(self, **columns: NDArray[Any]) -> None:
        """Add rows."""
        import pyarrow as pa
        from pyarrow import parquet

        rows = pa.table({name: pa.array(values) for name, values in columns.items()})
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self._buffer, rows.schema)
        self._writer.write_table(rows)

    def finished(self) -> bytes:
        """Return the file; an empty one where no rows were added."""
        if self._writer is not None:
            self._writer.close()
        return self._buffer.getvalue()


def _patches_table(pieces: Sequence[Arrays]) -> bytes:
    """Return a row a patch: its number, corner in level-0 px, the kind that contributes most, and the sum of each."""
    table = Table()
    for arrays in pieces:
        sums = arrays["cells/sums"]
        first = np.abs(sums).argmax(axis=1) + 1 if sums.shape[1] else np.zeros(len(sums), np.int64)
        y, x = arrays["patch/yx"].T
        table.add(
            patch=arrays["patch/number"],
            y=y,
            x=x,
            cluster=np.where(sums.any(axis=1), first, 0),
            **{f"evidence_{i + 1}": column for i, column in enumerate(sums.T)},
        )
    return table.finished()


class _Sums:
    """Sums over the places of a slide, and for each kind the patches that could be shown of it.

    `unit/...` [U] are sums for units, which are the slide, or a patch or a few of them; `kind/...` [k] for the slide.
    """

    def __init__(self, plan: EvidencePlan, slide: str) -> None:
        assert plan.kinds is not None
        self._kinds, patches = plan.kinds, plan.counts[slide]
        self._units = min(patches, UNITS) if plan.single else 1
        self._each = -(-patches // self._units)
        self._patches = self._places = 0
        self._most = {**_MOST, "covered": 1} if plan.unit == "slide" else _MOST
        k = len(self._kinds)
        self._of_units = {
            "mass": np.zeros((self._units, len(SIDES))),
            "area": np.zeros(self._units),
            "own_mass": np.zeros((self._units, k)),
            "own_area": np.zeros((self._units, k)),
        }
        self._of_kinds = {"probability": np.full(k, np.nan)}
        self._random = [
            np.random.default_rng([plan.settings.seed, kind, *slide.encode("utf-8", "surrogateescape")])
            for kind in range(k)
        ]
        self._candidates: dict[str, Arrays] = {}

    def add(
        self, arrays: Arrays, kinds: NDArray[np.int64], likeness: NDArray[np.float32], given: Mapping[str, Floats]
    ) -> None:
        """Add the places of a piece; `given` are the shares [n] of each that lie on something, by its name."""
        patch, value, weight = arrays["place/patch"], arrays["place/value"], weights_of(arrays)
        unit = (self._patches + patch) // self._each
        size, side = np.abs(value) * weight, (value < 0).astype(np.int64)
        np.add.at(self._of_units["mass"], (unit, side), size)
        np.add.at(self._of_units["area"], unit, weight)
        rows = np.flatnonzero(kinds >= 0)
        np.add.at(self._of_units["own_mass"], (unit[rows], kinds[rows]), size[rows])
        np.add.at(self._of_units["own_area"], (unit[rows], kinds[rows]), weight[rows])
        suspects = {name: values for name, values in arrays.items() if name.startswith("suspect/")}
        for name, shares in {**suspects, **given}.items():
            self._add_to(f"on/{name}", kinds[rows], size[rows] * shares[rows])
        if "patch/probability" in arrays:
            self._of_kinds["probability"] = np.nan_to_num(self._of_kinds["probability"])
            self._add_to("probability", kinds[rows], size[rows] * arrays["patch/probability"][patch[rows]])
        for kind in range(len(self._kinds)):
            self._choose(kind, arrays, kinds == kind, likeness)
        self._patches += len(arrays["patch/number"])
        self._places += len(kinds)

    def _add_to(self, name: str, kinds: NDArray[np.int64], values: Floats) -> None:
        sums = self._of_kinds.setdefault(name, np.zeros(len(self._kinds)))
        sums += np.bincount(kinds, values, len(self._kinds))

    def _choose(self, kind: int, arrays: Arrays, own: NDArray[np.bool_], likeness: NDArray[np.float32]) -> None:
        """Keep the patches of a kind that may be shown, of this piece and of those before.

        Covered are some that are drawn in proportion to what the kind contributes in them; of a slide-level model one,
        which stands for the slide, so that slides are drawn in proportion to that. Extremes contribute most;
        typical ones are nearest to the kind's centre, of those that contribute more than its middle.
        """
        patches = len(arrays["patch/number"])
        waiting = self._random[kind].exponential(size=patches)
        places = np.flatnonzero(own)
        patch, size = arrays["place/patch"][places], np.abs(arrays["place/value"][places])
        mass = np.bincount(patch, size * weights_of(arrays)[places], patches)
        largest, nearest = np.zeros(patches), np.full(patches, -1.0)
        np.maximum.at(largest, patch, size)
        strong = size >= self._kinds.middles[kind]
        np.maximum.at(nearest, patch[strong], likeness[places][strong])
        with np.errstate(divide="ignore"):
            orders = {"covered": waiting / mass, "extreme": -largest, "typical": -nearest}
        present = {"covered": mass > 0, "extreme": mass > 0, "typical": nearest > -1}
        for name, most in self._most.items():
            rows = np.flatnonzero(present[name])
            new = {
                "number": arrays["patch/number"][rows],
                "yx": arrays["patch/yx"][rows],
                "weight": arrays["patch/weight"][rows],
                "order": orders[name][rows],
            }
            before = self._candidates.get(f"{name}/{kind}", {key: values[:0] for key, values in new.items()})
            both = {key: np.concatenate([before[key], values]) for key, values in new.items()}
            first = np.argsort(both["order"], kind="stable")[:most]
            self._candidates[f"{name}/{kind}"] = {key: values[first] for key, values in both.items()}

    def arrays(self) -> Arrays:
        """Return all by name."""
        found = {f"unit/{name}": values for name, values in self._of_units.items()}
        found |= {f"kind/{name}": values for name, values in self._of_kinds.items()}
        found |= {f"{name}/{key}": v for name, one in self._candidates.items() for key, v in one.items()}
        return found | {"counted": np.array([self._places, self._patches])}


@dataclass(frozen=True)
class Given:
    """What people have drawn on a slide: annotations, regions that should not decide, and marks.

    Attributes:
        drawn: by what they are, "annotation" or "region".
        marks: outlines by kind of mark, each [m, 2], (y, x) in level-0 px.
    """

    drawn: Mapping[str, Annotated] = field(default_factory=dict)
    marks: Mapping[str, Sequence[Floats]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, settings: AuditSettings, out: StoragePath, entry: SlideEntry, plan: SlidePlan, folder: SlideFolder
    ) -> Given:
        """Return what is drawn on a slide; raises what cannot be read of it."""
        ground, drawn = ground_of(plan, folder, settings), {}
        for name, path in (("annotation", settings.annotations), ("region", settings.regions)):
            found = annotated_slide(path, entry.id, (), plan.slide_px, entry.path, ground)
            if found is not None:
                drawn[name] = found
        outlines: dict[str, list[Floats]] = {}
        for mark in Marks(out).of(entry.id):
            if mark.kind != "note":
                outlines.setdefault(mark.kind, []).append(np.array(mark.outline, np.float64))
        return cls(drawn, outlines)

    def shares(
        self, arrays: Arrays, view: tuple[float, float, float, float], grid: tuple[int, int]
    ) -> dict[str, Floats]:
        """Return the share [n] of each place of a piece that lies on each class, by "annotation/CLASS" and so on.

        A place lies on a mark where its centre does.
        """
        patch, cell = arrays["place/patch"], arrays["place/cell"]
        found: dict[str, Floats] = {}
        for what, annotated in self.drawn.items():
            yx = [(y, x) for y, x in arrays["patch/yx"].tolist()]
            for name, masks in annotated.masks_by_class(yx, view).items():
                found[f"{what}/{name}"] = cell_shares(masks, grid)[patch, cell]
        middles = centres(arrays, view, grid)
        for kind, outlines in self.marks.items():
            found[f"mark/{kind}"] = np.any([inside(one, middles) for one in outlines], axis=0).astype(np.float64)
        return found


def inside(outline: Floats, yx: Floats) -> NDArray[np.bool_]:
    """Return which points [n, 2] lie in a closed outline [m, 2]: a ray from each meets it an odd number of times."""
    found = np.zeros(len(yx), np.bool_)
    for (y0, x0), (y1, x1) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        if y0 != y1:
            crosses = (yx[:, 0] < y0) != (yx[:, 0] < y1)
            found ^= crosses & (yx[:, 1] < x0 + (yx[:, 0] - y0) * (x1 - x0) / (y1 - y0))
    return found


def cell_shares(masks: NDArray[np.bool_], grid: tuple[int, int]) -> Floats:
    """Return the share [P, n] of each cell of a grid that masks [P, h, w] cover; pixels are of one cell each."""
    rows, columns = (
        np.minimum(((np.arange(side) + 0.5) * cells / side).astype(np.int64), cells - 1)
        for side, cells in zip(masks.shape[1:], grid, strict=True)
    )
    cell = (rows[:, None] * grid[1] + columns[None]).ravel()
    sizes = np.bincount(cell, minlength=grid[0] * grid[1])
    sums = np.stack([np.bincount(cell, mask.ravel(), len(sizes)) for mask in masks])
    found: Floats = sums / np.maximum(sizes, 1)
    return found


@dataclass(eq=False)
class Tally:
    """The sums of all slides, added one slide after the other.

    Attributes:
        slides: [U] ids of the units' slides.
        mass: [U, 2] all that speaks for the target, and against it.
        area: [U] places.
        own_mass, own_area: [U, k] the same of each kind, on its own side.
        on: what of each kind [k] lies on something, by its name.
        probability: [k] sum of the target's probability, each kind's patches weighed by what it contributes in them.
        places, patches: how many there are.
    """

    slides: NDArray[np.str_]
    mass: Floats
    area: Floats
    own_mass: Floats
    own_area: Floats
    on: dict[str, Floats]
    probability: Floats
    places: int
    patches: int

    @property
    def of_kinds(self) -> Floats:
        """What each kind contributes, [k]."""
        found: Floats = self.own_mass.sum(axis=0)
        return found


def tally(summed: Iterable[tuple[str, Arrays]], kinds: int) -> tuple[Tally, dict[str, tuple[Shown, ...]]]:
    """Return the sums of all slides, given one after the other, and the patches that are to be shown of each."""
    names: list[str] = []
    kept: dict[str, list[Floats]] = {name: [] for name in ("mass", "area", "own_mass", "own_area")}
    # Few large arrays: a slide's own would take more memory for their headers than for what they hold.
    on: dict[str, Floats] = {}
    probability, counted = np.zeros(kinds), np.zeros(2, np.int64)
    chosen = _Chosen(kinds)
    for slide, arrays in summed:
        filled = arrays["unit/area"] > 0
        names += [slide] * int(filled.sum())
        for name, parts in kept.items():
            parts.append(arrays[f"unit/{name}"][filled])
            if len(parts) > JOINED:
                parts[:] = [np.concatenate(parts)]
        for name, sums in arrays.items():
            if name.startswith("kind/on/"):
                key = name.removeprefix("kind/on/")
                on[key] = on.get(key, 0) + sums
        probability = probability + arrays["kind/probability"]
        counted += arrays["counted"]
        chosen.add(slide, arrays)
    found = Tally(
        np.array(names, np.str_),
        **{name: np.concatenate(parts) for name, parts in kept.items()},
        on=on,
        probability=probability,
        places=int(counted[0]),
        patches=int(counted[1]),
    )
    return found, chosen.shown()


class _Chosen:
    """The patches that are shown of each kind: a first one of each slide, then a second one, until there are enough."""

    def __init__(self, kinds: int) -> None:
        self._kinds = range(kinds)
        self._best: dict[str, list[tuple[int, float, str, int, tuple[int, int], float]]] = {}

    def add(self, slide: str, arrays: Arrays) -> None:
        """Add the candidates of a slide."""
        for name, most in _MOST.items():
            for kind in self._kinds:
                key = f"{name}/{kind}"
                if f"{key}/order" not in arrays:
                    continue
                columns = [arrays[f"{key}/{column}"].tolist() for column in ("order", "number", "yx", "weight")]
                rows = [
                    (turn, order, slide, number, (yx[0], yx[1]), weight)
                    for turn, (order, number, yx, weight) in enumerate(zip(*columns, strict=True))
                ]
                self._best[key] = sorted([*self._best.get(key, []), *rows])[:most]

    def shown(self) -> dict[str, tuple[Shown, ...]]:
        """Return the patches by slide; an extreme of a kind is none of its typical ones."""
        found: dict[str, list[Shown]] = {}
        for kind in self._kinds:
            covered, extreme, typical = (self._best.get(f"{name}/{kind}", []) for name in _MOST)
            patches = {row[2:4]: row for row in (*covered, *extreme, *typical)}
            examples = dict.fromkeys([row[2:4] for row in extreme][:EXAMPLES], "extreme")
            examples |= dict.fromkeys([p for row in typical if (p := row[2:4]) not in examples][:EXAMPLES], "typical")
            drawn = {row[2:4] for row in covered}
            for key in sorted(drawn | examples.keys()):
                *_, slide, number, yx, weight = patches[key]
                one = Shown(number, yx, weight, kind, examples.get(key, ""), key in drawn)
                found.setdefault(slide, []).append(one)
        return {slide: tuple(own) for slide, own in sorted(found.items())}
