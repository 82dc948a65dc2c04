"""What was found: the kinds of evidence in numbers, tests and plain words.

A kind is a shortcut if two things come together: it is spread unevenly over sites or scanners, by a test that permutes
slides, and the answer falls when it is covered, by more than when an equal area is covered elsewhere (for slide-level
models, when its patches are taken out of the bag). p-values are corrected for all kinds (Holm 1979).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from wsi_gradcam.audit.findings import ALPHA, capitalised, percent
from wsi_gradcam.audit.measurements import FEWEST_SLIDES, Estimate, compare, estimate, holm, permutation_p
from wsi_gradcam.audit.schema import Unit
from wsi_gradcam.evidence import COLOURS, PRESENT, Against, Covering, Finding, Row, Share, Spread, TrialRow
from wsi_gradcam.evidence.clusters import SIDES, Side

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.findings import Verdict
    from wsi_gradcam.evidence.clusters import Choice
    from wsi_gradcam.evidence.tables import Tally

    Floats = NDArray[np.float64]

MUCH_MORE = 3.0  # a kind must be this many times denser in one group than in the others to be reported
ADDED = 0.25  # of what a kind contributes more in one group: all kinds together must add this (slide-level models)
ON_SUSPECT = 0.5  # of a kind's evidence on ink, glass, blur, the border, or what is given: reported from here on
WORTH_TELLING = 0.05  # of the evidence, on such things, where covering it does not show that it matters
FACTORS = ("site", "scanner", "label")


class KindRow(Row):
    """A kind of evidence."""

    number: Annotated[int, Field(description="from 1 on, as in the tables and in names.yaml")]
    name: Annotated[str, Field(description="given in names.yaml; empty where none is")]
    colour: Annotated[str, Field(description="six hex digits: in the report, in label images and in exports")]
    side: Annotated[Side, Field(description="whether it speaks for or against the target")]
    share: Annotated[Share, Field(description="of all that speaks for the target, or against it")]
    area: Annotated[Share, Field(description="of the explained tissue")]
    lift: Annotated[float | None, Field(description="share over area")]
    slides: Annotated[int, Field(description="on which it is a hundredth of the evidence at least")]
    of_slides: int
    patients: Annotated[
        int | None, Field(description="on whose slides it is; null where the list of slides tells none")
    ]
    of_patients: int | None
    largest_patient: Annotated[float | None, Field(description="share of it that lies on one patient's slides")]
    probability: Annotated[
        float | None,
        Field(description="mean of the target's class, of patches with the kind; of slide-level models, of slides"),
    ]
    suspects: Annotated[dict[str, float], Field(description="share of its evidence on ink, glass, blur, border")]
    regions: Annotated[dict[str, float], Field(description="the same on regions that are given, by class")]
    annotations: Annotated[dict[str, float], Field(description="the same in annotated areas, by class")]
    marks: Annotated[dict[str, float], Field(description="the same in regions and patches that people marked, by kind")]
    spread: list[Spread]
    covering: Covering | None
    shortcut: bool


class Evidence(Row):
    """All that `wsi-gradcam evidence` found; `evidence.json`."""

    format: int = 1
    model: str
    model_digest: str
    run: str
    level: Annotated[Unit, Field(description="what the model answers for: patches, or whole slides")] = "patch"
    layer: Annotated[str, Field(description="whose cells are places; of slide-level models places are patches")]
    bag_method: Annotated[str, Field(description="which gives a slide-level model's patches their evidence")] = ""
    target: str
    seed: int
    places: int
    patches: int
    patches_of_run: int
    slides: int
    slides_of_run: int
    unit: Annotated[Literal["slide", "patch"], Field(description="what intervals and tests resample")]
    worth_sorting: Annotated[bool, Field(description="false where the model has learned nothing of such patches")]
    learned: Annotated[str, Field(description="why, in words")]
    sure: Annotated[dict[str, bool], Field(description="whether the number of kinds is sure, by side")]
    trials: list[TrialRow]
    kinds: list[KindRow]
    findings: list[Finding]
    not_read: Annotated[dict[str, str], Field(description="slides that were left out, and why")]
    against: Annotated[Against | None, Field(description="another model's evidence on the same slides")] = None

    @property
    def shortcuts(self) -> list[KindRow]:
        """The kinds that look like shortcuts."""
        return [kind for kind in self.kinds if kind.shortcut]

    @property
    def statements(self) -> list[tuple[str, str]]:
        """All statements in words, each with its type."""
        nothing = [] if self.worth_sorting else [("nothing", f"There is no evidence worth sorting. {self.learned}")]
        against = [] if self.against is None else [("against", words) for words in self.against.words]
        return [*nothing, *((finding.kind, finding.words) for finding in self.findings), *against]


@dataclass(frozen=True, eq=False)
class Covered:
    """Patches in which a kind was covered: the change, that of equal areas elsewhere, slide and weight, each [m]."""

    change: Floats
    elsewhere: Floats
    slide: NDArray[np.str_]
    weight: Floats


@dataclass(frozen=True, eq=False)
class Facts:
    """What the numbers are about, besides the places.

    Attributes:
        groups: of the slides, such as "site", by slide id.
        names: that the user has given to kinds, by number.
        learned: whether the model has learned anything.
        level: what it predicts for.
        bag_method: of a slide-level model.
    """

    model: str
    model_digest: str
    run: str
    layer: str
    target: str
    seed: int
    patches_of_run: int
    slides_of_run: int
    learned: Verdict
    groups: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    not_read: Mapping[str, str] = field(default_factory=dict)
    level: Unit = "patch"
    bag_method: str = ""


def find(sums: Tally, choice: Choice | None, covered: Mapping[int, Covered], facts: Facts) -> Evidence:
    """Return all findings about places sorted into kinds, from their sums."""
    worth = choice is not None and is_worth_sorting(facts.learned, facts.level)
    kinds = [] if choice is None or not worth else _rows(sums, choice, covered, facts)
    trials = [] if choice is None else [_trial_row(choice, side, i) for side in SIDES for i in _numbers(choice, side)]
    slides = len(np.unique(sums.slides))
    return Evidence(
        model=facts.model,
        model_digest=facts.model_digest,
        run=facts.run,
        level=facts.level,
        layer=facts.layer,
        bag_method=facts.bag_method,
        target=facts.target,
        seed=facts.seed,
        places=sums.places,
        patches=sums.patches,
        patches_of_run=facts.patches_of_run,
        slides=slides,
        slides_of_run=facts.slides_of_run,
        unit="slide" if slides >= FEWEST_SLIDES else "patch",
        worth_sorting=worth,
        learned=facts.learned.words,
        sure={} if choice is None else {side: choice.is_sure(side) for side in SIDES},
        trials=trials,
        kinds=kinds,
        findings=in_words(kinds, facts.target, facts.level),
        not_read=dict(facts.not_read),
    )


def is_worth_sorting(learned: Verdict, level: Unit) -> bool:
    """Return whether there may be evidence: with few slides that cannot be known; places are sorted anyway."""
    return learned.outcome == "holds" or (level == "slide" and learned.outcome == "unclear")


def _numbers(choice: Choice, side: Side) -> range:
    return range(len(choice.tried[side]))


def _trial_row(choice: Choice, side: Side, number: int) -> TrialRow:
    one = choice.tried[side][number]
    return TrialRow(
        side=side,
        kinds=one.kinds,
        stability=one.stability,
        silhouette=one.silhouette,
        chosen=choice.chosen(side) == one,
    )


def _rows(sums: Tally, choice: Choice, covered: Mapping[int, Covered], facts: Facts) -> list[KindRow]:
    rows = [_row(sums, number, side, covered.get(number), facts) for number, side in enumerate(choice.kinds.sides)]
    spreads = [(i, j) for i, row in enumerate(rows) for j, one in enumerate(row.spread) if one.p is not None]
    even = holm([rows[i].spread[j].p or 0.0 for i, j in spreads])
    tested = [i for i, row in enumerate(rows) if row.covering is not None and row.covering.p is not None]
    moved = holm([rows[i].covering.p or 0.0 for i in tested])  # type: ignore[union-attr]
    of_spread, of_covering = dict(zip(spreads, even, strict=True)), dict(zip(tested, moved, strict=True))
    return [_judged(row, i, of_spread, of_covering) for i, row in enumerate(rows)]


def _judged(
    row: KindRow, number: int, of_spread: Mapping[tuple[int, int], float], of_covering: Mapping[int, float]
) -> KindRow:
    """Return a row with corrected p-values, and whether it looks like a shortcut."""
    spread = [one.model_copy(update={"p_adjusted": of_spread.get((number, j))}) for j, one in enumerate(row.spread)]
    covering = row.covering
    if covering is not None:
        covering = covering.model_copy(update={"p_adjusted": of_covering.get(number)})
    row = row.model_copy(update={"spread": spread, "covering": covering})
    return row.model_copy(update={"shortcut": any(adds(one) for one in uneven(row)) and matters(row)})


def uneven(row: KindRow, by: Sequence[str] = ("site", "scanner")) -> list[Spread]:
    """Return the groupings over which a kind is spread much more unevenly than by chance."""
    return [
        one
        for one in row.spread
        if one.by in by and one.p_adjusted is not None and one.p_adjusted <= ALPHA and times_more(one) >= MUCH_MORE
    ]


def times_more(spread: Spread) -> float:
    """Return how many times larger the density is in the group where it is largest than in the others together."""
    first, rest = _first_and_rest(spread, spread.density)
    return first / rest if rest > 0 else float("inf")


def _first_and_rest(spread: Spread, values: Mapping[str, float]) -> tuple[float, float]:
    """Return a mean of the group in which a kind is densest, and that of all slides of the others."""
    first = max(spread.density, key=lambda name: spread.density[name])
    others = {name: of for name, (_, of) in spread.groups.items() if name != first}
    return values[first], sum(values[name] * of for name, of in others.items()) / sum(others.values())


def adds(spread: Spread) -> bool:
    """Return whether there is more evidence in all where a kind is dense: else it may take the place of another.

    Patches hold more than one thing: the same tissue that looks different at a site is a kind of its own there, and
    without it the answer falls; but then other sites have as much evidence of the kind that they have instead. Cells of
    a patch-level model are not asked.
    """
    if not spread.total:
        return True
    (dense, less), (whole, rest) = (_first_and_rest(spread, values) for values in (spread.density, spread.total))
    return spread.p_total is not None and spread.p_total <= ALPHA and whole - rest >= ADDED * (dense - less)


def matters(row: KindRow) -> bool:
    """Return whether covering a kind moves the answer to the other side, more than covering an equal area elsewhere."""
    one = row.covering
    if one is None or one.p_adjusted is None or one.difference.value is None:
        return False
    return one.p_adjusted <= ALPHA and (one.difference.value < 0) == (row.side == "for")


def _row(sums: Tally, number: int, side: Side, covered: Covered | None, facts: Facts) -> KindRow:
    mass, own_mass, own_area = sums.mass[:, SIDES.index(side)], sums.own_mass[:, number], sums.own_area[:, number]
    share = _share(own_mass, mass, sums.slides, facts.seed)
    of_area = _share(own_area, sums.area, sums.slides, facts.seed)
    of_slide, density = _by_slide(own_mass, mass, sums.slides), _by_slide(own_mass, sums.area, sums.slides)
    whole = _by_slide(mass, sums.area, sums.slides) if facts.level == "slide" else {}
    total = float(own_mass.sum())
    probability = sums.probability[number] / total if total > 0 else np.nan
    return KindRow(
        number=number + 1,
        name=facts.names.get(number + 1, ""),
        colour=COLOURS[number % len(COLOURS)],
        side=side,
        share=share,
        area=of_area,
        lift=share.value / of_area.value if share.value is not None and of_area.value else None,
        slides=sum(value >= PRESENT for value in of_slide.values()),
        of_slides=len(of_slide),
        **_patients(own_mass, of_slide, sums, facts),
        probability=None if np.isnan(probability) else float(probability),
        suspects=_on(sums, "suspect", number),
        regions=_on(sums, "region", number),
        annotations=_on(sums, "annotation", number),
        marks=_on(sums, "mark", number),
        spread=[one for by in FACTORS if (one := _spread(of_slide, density, whole, by, facts)) is not None],
        covering=None if covered is None else _covering(covered, facts),
        shortcut=False,
    )


def _patients(own: Floats, of_slide: Mapping[str, float], sums: Tally, facts: Facts) -> dict[str, int | float | None]:
    """Return on how many patients' slides a kind occurs, of how many, and what share of it comes from one patient."""
    known = {slide: patient for slide, patient in facts.groups.get("patient", {}).items() if slide in of_slide}
    if not known:
        return {"patients": None, "of_patients": None, "largest_patient": None}
    present = {patient for slide, patient in known.items() if of_slide[slide] >= PRESENT}
    masses: dict[str, float] = {}
    for slide, mass in zip(sums.slides.tolist(), own.tolist(), strict=True):
        if slide in known:
            masses[known[slide]] = masses.get(known[slide], 0.0) + mass
    total = sum(masses.values())
    largest = max(masses.values()) / total if total > 0 else None
    return {"patients": len(present), "of_patients": len(set(known.values())), "largest_patient": largest}


def _on(sums: Tally, what: str, number: int) -> dict[str, float]:
    """Return the share of a kind that lies on each thing of one sort, by name."""
    total, start = float(sums.own_mass[:, number].sum()), f"{what}/"
    return {
        name.removeprefix(start): float(values[number]) / total if total > 0 else 0.0
        for name, values in sums.on.items()
        if name.startswith(start)
    }


def _share(part: Floats, whole: Floats, slides: NDArray[np.str_], seed: int) -> Share:
    """Return the share that `part` [P] is of `whole` [P], sums over patches."""
    known = whole > 0
    if not known.any():
        return Share(value=None, low=None, high=None)
    found = estimate(part[known] / whole[known], slides[known], whole[known], seed)
    return as_share(found)


def as_share(found: Estimate) -> Share:
    """Return an estimate as a share; null where there is none."""
    return Share(**{name: None if np.isnan(v := getattr(found, name)) else v for name in ("value", "low", "high")})


def _by_slide(part: Floats, whole: Floats, slides: NDArray[np.str_]) -> dict[str, float]:
    """Return the share of each slide's evidence, by slide id; slides without evidence are left out."""
    names, member = np.unique(slides, return_inverse=True)
    sums = np.bincount(member, part, len(names)), np.bincount(member, whole, len(names))
    return {name: float(p / w) for name, p, w in zip(names.tolist(), *sums, strict=True) if w > 0}


def _spread(
    of_slide: Mapping[str, float], density: Mapping[str, float], whole: Mapping[str, float], by: str, facts: Facts
) -> Spread | None:
    """Return how a kind is spread over groups of slides; None if the list of slides states no groups.

    Args:
        of_slide, density: its share of each slide's evidence, and what it contributes per place.
        whole: what all kinds of its side contribute; empty if that is not compared.
    """
    known = {name: group for name, group in facts.groups.get(by, {}).items() if name in of_slide}
    if not known:
        return None
    share, dense = (np.array([of[name] for name in known]) for of in (of_slide, density))
    group, total = np.array(list(known.values())), np.array([whole.get(name, 0.0) for name in known])
    strata = None
    if by != "label":
        labels = facts.groups.get("label", {})
        strata = np.array([labels.get(name, "") for name in known])
    return Spread(
        by=by,
        groups={
            str(name): [int((share[group == name] >= PRESENT).sum()), int((group == name).sum())]
            for name in np.unique(group)
        },
        share={str(name): float(share[group == name].mean()) for name in np.unique(group)},
        density={str(name): float(dense[group == name].mean()) for name in np.unique(group)},
        p=permutation_p(dense, group, facts.seed, strata),
        p_adjusted=None,
        total={str(name): float(total[group == name].mean()) for name in np.unique(group)} if whole else {},
        p_total=permutation_p(total, group, facts.seed, strata) if whole else None,
    )


def _covering(covered: Covered, facts: Facts) -> Covering | None:
    known = np.isfinite(covered.change) & np.isfinite(covered.elsewhere)
    if not known.any():
        return None
    change, other = covered.change[known], covered.elsewhere[known]
    slide, weight, seed = covered.slide[known], covered.weight[known], facts.seed
    found = compare(change, other, slide, weight, seed)
    return Covering(
        how="removed" if facts.level == "slide" else "covered",
        patches=int(known.sum()),
        slides=len(np.unique(slide)),
        change=as_share(estimate(change, slide, weight, seed)),
        elsewhere=as_share(estimate(other, slide, weight, seed)),
        difference=as_share(found.difference),
        p=None if np.isnan(found.p) else found.p,
        p_adjusted=None,
    )


def in_words(kinds: Sequence[KindRow], target: str, level: Unit = "patch") -> list[Finding]:
    """Return the findings: shortcuts, of which those on what should not decide come first, then such things, then the
    evidence by its share, then what is unevenly spread.
    """
    found: list[tuple[float, float, Finding]] = []
    for row in kinds:
        weight = -(row.share.value or 0.0)
        if row.shortcut:
            known = 0.0 if _suspect(row)[1] >= ON_SUSPECT else 0.5
            found.append(
                (known, weight, Finding(kind="shortcut", cluster=row.number, words=_shortcut_words(row, target)))
            )
        elif row.side == "for" and (words := _suspect_words(row, target)):
            found.append((1, weight, Finding(kind="suspect", cluster=row.number, words=words)))
        elif row.side == "for":
            found.append(
                (2, weight, Finding(kind="evidence", cluster=row.number, words=_evidence_words(row, target, level)))
            )
        if not row.shortcut and (spread := uneven(row)):
            found.append((3, weight, Finding(kind="uneven", cluster=row.number, words=_uneven_words(row, spread[0]))))
    return [one for *_, one in sorted(found, key=lambda one: one[:2])]


def called(row: KindRow) -> str:
    """Return the name of a kind for a sentence.

    >>> called(KindRow.model_construct(number=3, name="nuclei")), called(KindRow.model_construct(number=3, name=""))
    ('“nuclei” (cluster 3)', 'cluster 3')
    """
    return f"“{row.name}” (cluster {row.number})" if row.name else f"cluster {row.number}"


def _shortcut_words(row: KindRow, target: str) -> str:
    spread, (name, share) = uneven(row)[0], _suspect(row)
    lies = f"{percent(share)} of it lies on {name}, " if share >= ON_SUSPECT else ""
    return (
        f"{capitalised(called(row))} looks like a shortcut: {lies}{_where(row, spread)}, and {_effect(row)}. It is "
        f"{percent(row.share.value or 0.0)} of the evidence {row.side} {target}."
    )


def _suspect(row: KindRow) -> tuple[str, float]:
    """Return what a kind lies on most, of everything that should not affect the answer, and what share of it does."""
    marked = {f"what was marked as {kind}": v for kind, v in row.marks.items() if kind in ("artefact", "unexpected")}
    given = {f"“{name}” of the given regions": value for name, value in row.regions.items()}
    return max({**row.suspects, **given, **marked}.items(), key=lambda one: one[1], default=("", 0.0))


def _suspect_words(row: KindRow, target: str) -> str:
    name, share = _suspect(row)
    if share < ON_SUSPECT or not (matters(row) or (row.share.value or 0.0) >= WORTH_TELLING):
        return ""
    effect = f", and {_effect(row)}" if matters(row) else ""
    of_all = percent(row.share.value or 0.0)
    return (
        f"{capitalised(called(row))} lies on {name}: {percent(share)} of it. It is {of_all} of the evidence for "
        f"{target}{effect}."
    )


def _evidence_words(row: KindRow, target: str, level: Unit) -> str:
    area = "patches" if level == "slide" else "area"
    lift = "" if row.lift is None else f", {row.lift:.1f} times its share of the {area}"
    effect = f"; {_effect(row)}" if row.covering is not None and row.covering.difference.value is not None else ""
    name, inside = max(row.annotations.items(), key=lambda one: one[1], default=("", 0.0))
    effect = (f"; {percent(inside)} of it is annotated as “{name}”" if inside >= ON_SUSPECT else "") + effect
    if row.patients is not None:
        lift += f", of {row.patients} of {row.of_patients} patients"
    return (
        f"{percent(row.share.value or 0.0)} of the evidence for {target} lies on {called(row)}{lift}, "
        f"on {row.slides} of {row.of_slides} slides{effect}."
    )


def _uneven_words(row: KindRow, spread: Spread) -> str:
    words = f"{capitalised(called(row))} is spread unevenly: {_where(row, spread)}."
    if adds(spread) or not matters(row):
        return words
    return (
        f"{words} Without it the answer changes, but slides that have it do not have more evidence in all: it may be "
        "tissue that looks different there."
    )


def _where(row: KindRow, spread: Spread) -> str:
    """Return where a kind occurs: only on slides of one group, or more on those of the first than of the others."""
    present = {name: found for name, (found, _) in spread.groups.items() if found}
    if len(present) == 1:
        (name,) = present
        found, of = spread.groups[name]
        return f"it occurs on slides of {spread.by} {name} only ({found} of {of})"
    first = max(spread.density, key=lambda name: spread.density[name])
    times = times_more(spread)
    more = f"{times:.2g} times as much" if np.isfinite(times) else "many times as much"
    shares = f"{percent(spread.share[first])} of the evidence; "
    shares += ", ".join(f"{percent(v)} on {name}" for name, v in spread.share.items() if name != first)
    return f"on slides of {spread.by} {first} a patch has {more} of it as on others ({shares})"


def _effect(row: KindRow) -> str:
    """Return what covering a kind does beyond covering an equal area elsewhere, if that was measured."""
    one = row.covering
    assert one is not None
    assert one.difference.value is not None
    size, side = abs(one.difference.value), "lower" if one.difference.value < 0 else "higher"
    unsure = "" if matters(row) else ", which may be chance"
    if one.how == "removed":
        return f"without it the slide's logit is {size:.2g} {side} than without as much elsewhere{unsure}"
    return f"covering it leaves the logit {size:.2g} {side} than covering as much elsewhere{unsure}"
