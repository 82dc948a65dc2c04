"""The plan of an audit: its settings, its sample, and all that its numbers depend on. Small and picklable."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field

from wsi_gradcam.audit.vocabulary import ATTENTION, BAG_QUESTIONS, QUESTIONS, SINGLE, Unit, questions_of
from wsi_gradcam.errors import ConfigError
from wsi_gradcam.tissue.annotations import check_ending

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wsi_gradcam.cam.targets import Target
    from wsi_gradcam.run.plan import RunPlan

Frame = Literal["auto", "slide", "bounds"]  # of a drawing
FORMAT = 1  # of the numbers; raised when old ones must not be continued
# All batches are of this size, filled up where need be: for another size torch chooses other kernels, whose sums differ
# in the last bit with the number of threads.
BATCH_SIZE = 8
PATCHES = 200
SLIDES = 200  # of slide-level models
FEWEST_DEEP = 48  # patches on which what is slow is measured too: enough for a verdict, from 6 slides where there are
DEEP_SHARE = 10


@dataclass(frozen=True)
class AuditSettings:
    """The settings of an audit. Each field is a flag of `wsi-gradcam audit`, and its description the flag's help."""

    patches: Annotated[int, Field(description="approximate number of patches, over all slides")] = PATCHES
    seed: Annotated[int, Field(description="seed of the sample and all random numbers")] = 0
    only: Annotated[
        tuple[str, ...],
        Field(
            description=f"ask only some of {', '.join(QUESTIONS)}; for slide-level models {', '.join(BAG_QUESTIONS)} "
            "(default: all)"
        ),
    ] = tuple(QUESTIONS)
    target: Annotated[
        str,
        Field(
            description="which of the run's targets to audit (default: each patch's predicted class if all classes "
            "were explained, else the first target)"
        ),
    ] = ""
    annotations: Annotated[
        Path | None,
        Field(description="areas that show the target's class: a file, or a folder with one file per slide"),
    ] = None
    include: Annotated[
        tuple[str, ...], Field(description="annotation classes of `annotations` to use (default: all)")
    ] = ()
    regions: Annotated[
        Path | None,
        Field(
            description="the same for regions that should not decide, such as rulers, folds and pen; each class is "
            "tested"
        ),
    ] = None
    mask_frame: Annotated[
        Frame,
        Field(
            description="what both were drawn on: the whole slide, or its scanned part; auto: whichever places them on "
            "tissue, refused if both could"
        ),
    ] = "auto"

    slides: Annotated[int, Field(description="for slide-level models: approximate number of slides")] = SLIDES

    def __post_init__(self) -> None:
        for name in ("patches", "slides"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, expected 0 or more")
        check_questions(self.only)
        if self.mask_frame not in (frames := get_args(Frame)):
            raise ConfigError(f"mask_frame is {self.mask_frame!r}, expected one of {', '.join(frames)}")
        if self.include and self.annotations is None:
            raise ConfigError("include names classes of annotations; give their file or folder too")
        for path in (self.annotations, self.regions):
            if path is not None and not path.exists():
                raise ConfigError(f"{path}: does not exist, expected a file or a folder; check the path")
            if path is not None:
                check_ending(path)

    def asks(self, question: str) -> bool:
        """Return whether a question is asked."""
        return question in self.only

    def to_json(self) -> dict[str, Any]:
        """Return plain values, in the order of the questions."""
        known = {**QUESTIONS, **BAG_QUESTIONS}
        values = {**asdict(self), "only": [name for name in known if name in self.only]}
        for name in ("annotations", "regions"):
            values[name] = None if values[name] is None else str(values[name])
        if self.mask_frame == "auto":  # as in audits of older versions
            del values["mask_frame"]
        return {**values, "include": list(self.include)}


def check_questions(names: Sequence[str], unit: Unit | None = None) -> None:
    """Raise ConfigError for a name that is no question, or none that is asked of patches, or of slides."""
    known = {**QUESTIONS, **BAG_QUESTIONS} if unit is None else questions_of(unit)
    for name in names:
        if name not in known:
            what = "" if unit is None else {"patch": " of patches", "slide": " of slide-level models"}[unit]
            raise ConfigError(f"{name!r} is not a question of the audit{what}; expected some of {', '.join(known)}")


def asked_questions(only: Sequence[str], unit: Unit) -> tuple[str, ...]:
    """Return the questions that are asked, in the report's order; all where none is named.

    Raises:
        ConfigError: one is no question that is asked of patches, or of slides.
    """
    check_questions(only)
    check_questions(only, unit)
    return tuple(name for name in questions_of(unit) if not only or name in only)


@dataclass(frozen=True)
class SlideSample:
    """The patches of a slide that are audited.

    Attributes:
        patches: their numbers in the slide's table, in a random order that the seed decides.
        yx: level-0 px of their top left corners.
        weights: how many patches of the archive each stands for.
        strata: what each was drawn as.
        deep: this many batches, from the first on, are measured in depth.
    """

    patches: tuple[int, ...]
    yx: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]
    strata: tuple[str, ...]
    deep: int

    @property
    def batches(self) -> int:
        """The number of batches."""
        return -(-len(self.patches) // BATCH_SIZE)

    def batch(self, number: int) -> slice:
        """Return the places of a batch's patches."""
        return slice(number * BATCH_SIZE, min((number + 1) * BATCH_SIZE, len(self.patches)))

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SlideSample:
        """Return the sample of which these are the plain values; others raise KeyError or TypeError."""
        return cls(
            tuple(values["patches"]),
            tuple((y, x) for y, x in values["yx"]),
            tuple(values["weights"]),
            tuple(values["strata"]),
            int(values["deep"]),
        )


@dataclass(frozen=True, kw_only=True)
class AuditScope:
    """All that an audit's numbers depend on; it is known before the model is loaded.

    Attributes:
        run_digest: of the run whose results are audited.
        settings: of the audit.
        target: what is audited, one of the run's targets or each patch's predicted class.
        samples: by slide id.
        annotation_digests, region_digests: sha256 of the slides' files of annotations and regions, by slide id.
        unit: of which questions are asked; the sample of a slide is itself then, as if it were one patch.
    """

    run_digest: str
    settings: AuditSettings
    target: Target
    samples: Mapping[str, SlideSample]
    annotation_digests: Mapping[str, str]
    region_digests: Mapping[str, str]
    unit: Unit = "patch"

    def audit_identity(self) -> dict[str, Any]:
        """Return all that the numbers depend on: the content of annotations and regions, not their paths."""
        settings = self.settings.to_json()
        del settings["annotations"], settings["regions"], settings["patches" if self.unit == "slide" else "slides"]
        if self.unit == "slide":  # as in audits of older versions else
            settings["unit"] = self.unit
        sample = json.dumps({name: one.to_json() for name, one in sorted(self.samples.items())}, sort_keys=True)
        return {
            "format": FORMAT,
            "run": self.run_digest,
            **settings,
            "target": self.target.label,
            "annotations": dict(sorted(self.annotation_digests.items())),
            "regions": dict(sorted(self.region_digests.items())),
            "sample": hashlib.sha256(sample.encode()).hexdigest(),
        }

    def audit_digest(self) -> str:
        """Return the sha256 of `audit_identity()`."""
        return hashlib.sha256(json.dumps(self.audit_identity(), sort_keys=True).encode()).hexdigest()

    def planned(self, run: RunPlan, target: Target) -> AuditPlan:
        """Return the plan of this audit, with the run's as it is with the model, and its own target."""
        return AuditPlan(
            run=run, **{field.name: getattr(self, field.name) for field in fields(self)} | {"target": target}
        )


@dataclass(frozen=True, kw_only=True)
class AuditPlan(AuditScope):
    """The plan of an audit; workers get it once.

    Attributes:
        run: the run that is audited. Its model runs eagerly in float32, whatever the run chose.
        bag_methods: of a slide-level model, those whose relevance is audited, where they are not the run's.
    """

    run: RunPlan
    bag_methods: tuple[str, ...] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods whose maps are audited; of a slide-level model its bag methods, single patches and attention."""
        if self.unit == "patch":
            return self.run.settings.method
        bag = self.run.facts.bag
        assert bag is not None
        return self.bag_methods or (*self.run.settings.bag_method, SINGLE, *([ATTENTION] if bag.attention else []))


def deep_patches(patches: int) -> int:
    """Return the number of patches that are measured in depth, of all; a few more may be."""
    return max(FEWEST_DEEP, patches // DEEP_SHARE)


def patch_seeds(seed: int, slide: str, patches: Sequence[int]) -> list[int]:
    """Return a seed for each patch, that nothing but the audit's seed, the slide's id and the patch's number decide."""
    texts = (f"{seed}/{slide}/{patch}" for patch in patches)
    return [int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:6]) for text in texts]


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
