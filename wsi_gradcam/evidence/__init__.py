"""What does the model look at, across the archive?

The places that carry its evidence are sorted into kinds of morphology (Spectral Relevance Analysis, Lapuschkin 2019,
doi 10.1038/s41467-019-08987-4), each with its share of the evidence, its pictures, the slides on which it occurs, and
what happens to the answer when it is removed. `running.evidence_run` does this. This module defines what the numbers
depend on and where they are stored; `stages` runs the model, `clusters` finds the kinds, `labels` writes where they are
on each slide, `findings` counts and tests, `page` reports.

Anything that grows with the archive is written and read by workers, slide by slide: three passes over the slides of the
sample measure places, sort them, and look again at a few patches of each kind. The client reads only a bounded number
of places, to find the kinds, and the sums of each slide.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from wsi_gradcam.audit.plan import AuditFolder, AuditSettings, Frame, read_arrays, write_arrays
from wsi_gradcam.audit.schema import Unit
from wsi_gradcam.errors import ConfigError
from wsi_gradcam.io.zarr_stores import ZARR_CONTENTS

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from wsi_gradcam.cam.targets import Target
    from wsi_gradcam.evidence.clusters import Kinds
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.run.plan import RunPlan

FORMAT = 3  # of the numbers; increased when old ones must not be continued
PLACES = 20_000
DRAWN = 4  # places of a patch
PIECE = 64  # patches measured and stored together
PROBED = 48  # patches whose answers are compared with those of random copies, over all slides
# Of kinds by their number, in the page, in label images and in exports; distinct on pink and violet tissue.
COLOURS = (
    *("E69F00", "0072B2", "009E73", "F0E442", "56B4E9", "D55E00", "000000", "CC79A7"),
    *("117733", "88CCEE", "332288", "999933", "AA4499", "44AA99", "661100", "BBBBBB"),
)
NOTHING = 255  # in label images: looked at, but of no kind
PRESENT = 0.01  # of a slide's evidence; from this share on, a kind is said to occur on it


@dataclass(frozen=True)
class EvidenceSettings:
    """The settings of `wsi-gradcam evidence`. Each field is a flag, and its description is the flag's help."""

    places: Annotated[
        int, Field(description="about so many places, which are cells of the explained layer, of all slides together")
    ] = PLACES
    seed: Annotated[int, Field(description="of the sample and of all random numbers")] = 0
    target: Annotated[
        str, Field(description="whose evidence: one of the run's targets (default: the first that it explains)")
    ] = ""
    annotations: Annotated[
        Path | None,
        Field(
            description="annotated areas, whose classes clusters are compared with: a file, or a folder with one file "
            "per slide"
        ),
    ] = None
    regions: Annotated[
        Path | None,
        Field(description="the same for regions that should not decide, such as rulers, folds and pen"),
    ] = None
    mask_frame: Annotated[
        Frame,
        Field(
            description="what both were drawn on: the whole slide, or its scanned part; auto: whichever places them on "
            "tissue, refused if both could"
        ),
    ] = "auto"
    skip_labels: Annotated[
        bool,
        Field(description="write no label images and no tables of patches, for which each patch is looked at twice"),
    ] = False

    def __post_init__(self) -> None:
        if self.places < 1:
            raise ConfigError(f"places is {self.places}, expected 1 or more")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, expected 0 or more")
        self.drawings()

    def drawings(self) -> AuditSettings:
        """Return the settings of an audit with the same number of patches, annotations and regions.

        Raises:
            ConfigError: a path does not exist, or its format is not known.
        """
        return AuditSettings(
            patches=max(1, -(-self.places // DRAWN)),
            seed=self.seed,
            annotations=self.annotations,
            regions=self.regions,
            mask_frame=self.mask_frame,
        )


@dataclass(frozen=True, slots=True)
class SlideShare:
    """What is drawn from a slide; known before a worker reads the slide's table.

    Attributes:
        patches: approximate number of patches.
        stands_for: how many slides of the archive it stands for.
        like: the digest of another run's evidence whose patches are used, or "".
    """

    patches: int
    stands_for: float = 1.0
    like: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Shown:
    """A patch that is looked at again once kinds are known: an example of a kind, or one in which a kind is covered.

    Attributes:
        number: in the slide's table.
        yx: level-0 px of its top left corner.
        weight: how many patches it stands for.
        kind: which kind.
        example: "typical" or "extreme"; "" if the kind is only covered in it.
        covered: whether the kind is covered in it.
    """

    number: int
    yx: tuple[int, int]
    weight: float
    kind: int
    example: str
    covered: bool


Pass = Literal["measure", "sort", "show"]


@dataclass(frozen=True, kw_only=True)
class EvidencePlan:
    """The plan; it is sent to workers once for each of the three passes over the slides.

    Attributes:
        run: the run whose model and slides are used; its model runs eagerly in float32.
        run_digest: of the run's results.
        target: whose evidence it is.
        shares: what is drawn from each slide, by its id.
        counts: how many patches were drawn, by slide id; from the second pass on, for slides that have any.
        step: which pass it is.
        kinds: from the second pass on.
        names: that kinds have, by number.
        given: digest of the annotations, regions and marks with which kinds are compared.
        against: the folder of another run whose evidence this one's is compared with, and the digest of that; or "".
        others: the number of kinds in that evidence.
        single: whether sums are kept for single patches, as needed for intervals from fewer than six slides.
        unit: what the model predicts for. If it is a slide, a place is a patch, otherwise a cell of the explained
            layer.
        shown: in the third pass, patches by slide id.
    """

    run: RunPlan
    run_digest: str
    settings: EvidenceSettings
    target: Target
    shares: Mapping[str, SlideShare]
    counts: Mapping[str, int] = field(default_factory=dict)
    step: Pass = "measure"
    kinds: Kinds | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    given: str = ""
    against: tuple[str, str] = ("", "")
    others: int = 0
    single: bool = False
    unit: Unit = "patch"
    shown: Mapping[str, tuple[Shown, ...]] = field(default_factory=dict)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything the measured numbers depend on."""
        sample = json.dumps({name: one.to_json() for name, one in sorted(self.shares.items())}, sort_keys=True)
        return {
            "format": FORMAT,
            "run": self.run_digest,
            **{name: getattr(self.settings, name) for name in ("places", "seed")},
            "target": self.target.label,
            "sample": hashlib.sha256(sample.encode()).hexdigest(),
            **({} if self.unit == "patch" else {"unit": self.unit}),
        }

    @cached_property
    def digest(self) -> str:
        """The sha256 of `identity`."""
        return _digest(self.identity)

    @cached_property
    def sample_digest(self) -> str:
        """The sha256 of `identity` for the drawn patches."""
        return sample_digest(self.digest)

    @cached_property
    def cells_digest(self) -> str:
        """The sha256 of `identity` and of the kinds into which patches are sorted."""
        assert self.kinds is not None
        return _digest([self.identity, self.kinds.digest()])

    @cached_property
    def sums_digest(self) -> str:
        """The sha256 that also includes what a slide's sums depend on."""
        return _digest([self.cells_digest, self.given, self.single, "sums"])

    @cached_property
    def compared_digest(self) -> str:
        """The sha256 of these kinds and of the evidence with which they are compared."""
        return _digest([self.cells_digest, self.against[1]])

    @cached_property
    def shown_digest(self) -> str:
        """The sha256 of the kinds and of the patches of the third pass; these follow from the second."""
        shown = {name: [asdict(one) for one in own] for name, own in sorted(self.shown.items())}
        return _digest([self.cells_digest, shown])

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the places of a patch."""
        return (1, 1) if self.unit == "slide" else self.run.facts.cam_shape

    @property
    def drawn(self) -> int:
        """The number of places drawn from a patch."""
        return 1 if self.unit == "slide" else DRAWN

    def pieces(self, slide: str) -> int:
        """Return the number of pieces of a slide's sample or, in the third pass, of its shown patches."""
        return -(-(len(self.shown[slide]) if self.step == "show" else self.counts[slide]) // PIECE)

    def probed(self, slide: str) -> int:
        """Return how many of a slide's first patches are passed to random copies of the model.

        There may be fewer.
        """
        if slide not in self._probed_slides:
            return 0
        return min(PIECE, -(-PROBED // len(self.shares)))

    @cached_property
    def _probed_slides(self) -> frozenset[str]:
        return frozenset(list(self.shares)[:: max(1, len(self.shares) // PROBED)][:PROBED])


def sample_digest(digest: str) -> str:
    """Return the digest of the patches from which evidence with this digest was drawn."""
    return _digest([digest, "sample"])


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class EvidenceFolder(AuditFolder):
    """OUT/evidence. Pieces are stored like those of an audit, and named after the digest they belong to."""

    @property
    def metrics(self) -> StoragePath:
        """Everything that was found, written at the end."""
        return self.place / "evidence.json"

    @property
    def kinds(self) -> StoragePath:
        """What kinds consist of, so that their names can be kept when they are found again."""
        return self.place / "kinds.npz"

    @property
    def clusters(self) -> StoragePath:
        """The table of kinds."""
        return self.place / "clusters.parquet"

    @property
    def names(self) -> StoragePath:
        """The names given to kinds by the user."""
        return self.place / "names.yaml"

    def places(self, slide_id: str) -> StoragePath:
        """Return the table of a slide's places with their kinds."""
        return self.slide(slide_id) / "places.parquet"

    def patches(self, slide_id: str) -> StoragePath:
        """Return the table of a slide's patches with the kind that contributes most to each."""
        return self.slide(slide_id) / "patches.parquet"

    def labels(self, slide_id: str) -> StoragePath:
        """Return the label image of a slide's kinds, on the grid of its heatmap."""
        return self.slide(slide_id) / "clusters.ome.zarr"

    def forget(self, slide_id: str) -> None:
        """Delete everything that was written about a slide; other people's files stay."""
        self.places(slide_id).remove()
        self.forget_labels(slide_id)
        super().forget(slide_id)

    def forget_labels(self, slide_id: str) -> None:
        """Delete the label image of a slide, and the table of its patches."""
        self.patches(slide_id).remove()
        self.labels(slide_id).remove_files(ZARR_CONTENTS)


@dataclass(frozen=True, eq=False)
class DrawnPatches:
    """Patches of a slide that are in the sample, in a random order.

    Attributes:
        numbers: [n] in the slide's table.
        yx: [n, 2] level-0 px of their top left corners.
        weights: [n] how many patches of the archive each stands for.
    """

    numbers: NDArray[np.int64]
    yx: NDArray[np.int64]
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, numbers: Sequence[int], yx: Sequence[tuple[int, int]], weights: Sequence[float]) -> DrawnPatches:
        """Return those given as plain values."""
        return cls(np.array(numbers, np.int64), np.array(yx, np.int64).reshape(-1, 2), np.array(weights, np.float64))

    def __len__(self) -> int:
        return len(self.numbers)

    def piece(self, number: int) -> DrawnPatches:
        """Return those of a piece."""
        return self.only(slice(number * PIECE, (number + 1) * PIECE))

    def only(self, rows: Any) -> DrawnPatches:
        """Return some of the patches."""
        return DrawnPatches(self.numbers[rows], self.yx[rows], self.weights[rows])

    def shared(self, table: pa.Table) -> DrawnPatches:
        """Return those in another run's table of the slide that it could read, with the numbers it gave them."""
        columns = (table.column(name).to_pylist() for name in ("y", "x", "status"))
        there = {(y, x): i for i, (y, x, status) in enumerate(zip(*columns, strict=True)) if status == "ok"}
        numbers = np.array([there.get((y, x), -1) for y, x in self.yx.tolist()], np.int64)
        return DrawnPatches(numbers, self.yx, self.weights).only(numbers >= 0)

    def write(self, folder: EvidenceFolder, slide: str, digest: str) -> None:
        """Store them as the sample of a slide."""
        arrays = {"patch/number": self.numbers, "patch/yx": self.yx, "patch/weight": self.weights}
        write_arrays(folder.batch(slide, digest, 0), arrays)


def drawn_patches(folder: EvidenceFolder, slide: str, digest: str) -> DrawnPatches:
    """Return the patches drawn from a slide; raises FileNotFoundError if none were."""
    arrays = read_arrays(folder.batch(slide, digest, 0))
    return DrawnPatches(arrays["patch/number"], arrays["patch/yx"], arrays["patch/weight"])


def is_given(name: str) -> bool:
    """Return whether a file below OUT/evidence comes from the user and is not a result: the names of kinds."""
    return name == "names.yaml"


class Row(BaseModel):
    """A part of `evidence.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Share(Row):
    """A share with its 95% interval, by slide where there are enough."""

    value: float | None
    low: float | None
    high: float | None


class Spread(Row):
    """How a kind is spread over sites, scanners or labels."""

    by: Annotated[str, Field(description="site, scanner or label, as the list of slides tells them")]
    groups: Annotated[dict[str, list[int]], Field(description="slides with the kind, and slides, by group")]
    share: Annotated[dict[str, float], Field(description="mean share of the slides' evidence, by group")]
    density: Annotated[
        dict[str, float], Field(description="mean contribution of a place to the target, over all places, by group")
    ]
    p: Annotated[float | None, Field(description="of the densities, slides permuted; null with one group alone")]
    p_adjusted: Annotated[float | None, Field(description="corrected for all kinds (Holm)")]
    total: Annotated[
        dict[str, float],
        Field(description="of slide-level models: mean contribution of a patch by all kinds of that side, by group"),
    ] = {}
    p_total: Annotated[float | None, Field(description="of these, slides permuted; null where they are not told")] = (
        None
    )


class Covering(Row):
    """What happens to the explained scalar where the places of a kind are covered, or taken out of a slide's bag."""

    how: Annotated[
        Literal["covered", "removed"],
        Field(description="covered in a patch; of slide-level models, removed: all patches of the kind from the slide"),
    ] = "covered"
    patches: Annotated[int, Field(description="that were changed; of slide-level models slides")]
    slides: int
    change: Annotated[Share, Field(description="logits: without the kind less with it")]
    elsewhere: Annotated[Share, Field(description="the same of equal areas elsewhere in the patch, or on the slide")]
    difference: Annotated[Share, Field(description="of the two")]
    p: float | None
    p_adjusted: float | None


class Finding(Row):
    """A statement in plain words, the weightiest first."""

    kind: Annotated[Literal["shortcut", "suspect", "evidence", "uneven"], Field(description="what is stated")]
    cluster: int
    words: str


class TrialRow(Row):
    """A number of kinds of a side, how stable they are (adjusted Rand index) and how far apart (silhouette)."""

    side: Literal["for", "against"]
    kinds: int
    stability: float
    silhouette: float
    chosen: bool


class AgainstRow(Row):
    """A kind of one of two models, and what share of each one's evidence lies on its places."""

    cluster: Annotated[int | None, Field(description="the kind here; null for one of the other model")]
    there: Annotated[int | None, Field(description="the kind of the other model; for one here, that which is the same")]
    name: str
    side: Literal["for", "against"]
    share: Annotated[Share, Field(description="of this model's evidence, at the kind's places")]
    share_there: Annotated[Share, Field(description="of the other model's evidence, at the same places")]
    difference: Annotated[Share, Field(description="of the two, slide by slide")]
    p: Annotated[float | None, Field(description="signs of the slides' differences flipped; null with few slides")]
    p_adjusted: Annotated[float | None, Field(description="corrected for all rows (Holm)")]
    change: Annotated[Literal["begun", "more", "less", "dropped", ""], Field(description="empty: none that is told")]


class Against(Row):
    """Another model's evidence on the same slides."""

    out: str
    model: str
    model_digest: str
    target: str
    slides: Annotated[int, Field(description="on which both models' evidence was sorted")]
    rows: list[AgainstRow]
    words: Annotated[list[str], Field(description="what this model has begun to look at, and what it has dropped")]
