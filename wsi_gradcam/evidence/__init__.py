"""What does the model look at, across the archive?

The places that carry its evidence are sorted into kinds of morphology (Spectral Relevance Analysis, Lapuschkin 2019,
doi 10.1038/s41467-019-08987-4): each with its share of the evidence, its pictures, the slides on which it occurs, and
what happens to the answer when it is removed. `running.evidence_run` does it. Here stands what the numbers depend on
and where they lie; `measuring` runs the model, `clusters` finds the kinds, `findings` counts and tests, `page` reports.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from wsi_gradcam.audit.plan import AuditFolder
from wsi_gradcam.errors import ConfigError

if TYPE_CHECKING:
    from wsi_gradcam.audit.plan import SlideSample
    from wsi_gradcam.cam.targets import Target
    from wsi_gradcam.evidence.clusters import Kinds
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.run.plan import RunPlan

FORMAT = 1  # of the numbers; raised when old ones must not be continued
PLACES = 20_000
PIECE = 64  # patches that are measured and stored together
PROBED = 48  # patches whose answers are compared with those of random copies, of all slides together


@dataclass(frozen=True)
class EvidenceSettings:
    """The settings of `wsi-gradcam evidence`. Each field is a flag, and its description the flag's help."""

    places: Annotated[
        int, Field(description="about so many places, which are cells of the explained layer, of all slides together")
    ] = PLACES
    seed: Annotated[int, Field(description="of the sample and of all random numbers")] = 0
    target: Annotated[
        str, Field(description="whose evidence: one of the run's targets (default: the first that it explains)")
    ] = ""

    def __post_init__(self) -> None:
        if self.places < 1:
            raise ConfigError(f"places is {self.places}, expected 1 or more")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, expected 0 or more")


@dataclass(frozen=True)
class Shown:
    """A patch that is looked at again once kinds are known: an example of a kind, or one in which it is covered.

    Attributes:
        number: in the slide's table.
        yx: level-0 px of its top left corner.
        weight: how many patches it stands for.
        kind: which kind.
        example: "typical" or "extreme"; "" where it is only covered.
        covered: whether the kind is covered in it.
    """

    number: int
    yx: tuple[int, int]
    weight: float
    kind: int
    example: str
    covered: bool


@dataclass(frozen=True, kw_only=True)
class EvidencePlan:
    """The plan; workers get it once for each of the two passes over the slides.

    Attributes:
        run: the run whose model and slides these are; its model runs eagerly in float32.
        run_digest: of the run's results.
        target: whose evidence it is.
        samples: patches by slide id.
        kinds: in the second pass.
        shown: in the second pass, patches by slide id.
    """

    run: RunPlan
    run_digest: str
    settings: EvidenceSettings
    target: Target
    samples: Mapping[str, SlideSample]
    kinds: Kinds | None = None
    shown: Mapping[str, tuple[Shown, ...]] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """Return all that the numbers depend on."""
        sample = json.dumps({name: one.to_json() for name, one in sorted(self.samples.items())}, sort_keys=True)
        return {
            "format": FORMAT,
            "run": self.run_digest,
            **asdict(self.settings),
            "target": self.target.label,
            "sample": hashlib.sha256(sample.encode()).hexdigest(),
        }

    def digest(self) -> str:
        """Return the sha256 of `identity()`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def shown_digest(self) -> str:
        """Return the sha256 of `identity()` and of the patches of the second pass; they follow from the first."""
        shown = {name: [asdict(one) for one in own] for name, own in sorted(self.shown.items())}
        return hashlib.sha256(json.dumps([self.identity(), shown], sort_keys=True).encode()).hexdigest()

    def pieces(self, slide: str) -> int:
        """Return the number of pieces of a slide's sample, or in the second pass of its patches that are shown."""
        return -(-len(self.samples[slide].patches if self.kinds is None else self.shown[slide]) // PIECE)

    def probed(self, slide: str) -> int:
        """Return how many of a slide's patches, from the first on, are given to random copies of the model."""
        return min(len(self.samples[slide].patches), PIECE, -(-PROBED // len(self.samples)))


@dataclass(frozen=True)
class EvidenceFolder(AuditFolder):
    """OUT/evidence. Pieces are kept as those of an audit are, and named by the digest that they belong to."""

    @property
    def metrics(self) -> StoragePath:
        """All that was found, written at the end."""
        return self.place / "evidence.json"

    @property
    def clusters(self) -> StoragePath:
        """The table of kinds."""
        return self.place / "clusters.parquet"

    @property
    def names(self) -> StoragePath:
        """Names that the user gives to kinds."""
        return self.place / "names.yaml"

    def places(self, slide_id: str) -> StoragePath:
        """Return the table of a slide's places with their kinds."""
        return self.slide(slide_id) / "places.parquet"

    def forget(self, slide_id: str) -> None:
        """Delete all that was written of a slide; files that are not ours stay."""
        self.places(slide_id).remove()
        super().forget(slide_id)


def is_given(name: str) -> bool:
    """Return whether a file below OUT/evidence is given by the user, and no result: the names of kinds."""
    return name == "names.yaml"
