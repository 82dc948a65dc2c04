"""The report on the evidence: the values for its template."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from wsi_gradcam.audit.findings import capitalised, percent
from wsi_gradcam.audit.report.figures import Picture, colour_scale, overlay, picture, scale_of
from wsi_gradcam.audit.report.page import number, p_text
from wsi_gradcam.evidence.clusters import SIDES, STABLE
from wsi_gradcam.evidence.findings import called
from wsi_gradcam.pages import render

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.plan import Arrays
    from wsi_gradcam.evidence import AgainstRow, Covering, Share, Spread, TrialRow
    from wsi_gradcam.evidence.clusters import Side
    from wsi_gradcam.evidence.findings import Evidence, KindRow
    from wsi_gradcam.io.paths import StoragePath

OUTLINE = (20, 20, 20), (255, 225, 60)  # dark beside bright: visible on any tissue
MIDDLE = np.pad([[True]], 1)  # of a patch's surroundings, three of its sides wide
LEAST_PX = 112  # of an example's side: smaller patches are enlarged


@dataclass(frozen=True)
class ExampleCard:
    """An example patch of a kind: the patch with the kind's places outlined, and its map."""

    title: str
    extreme: bool
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class KindCard:
    """A kind with its numbers in words."""

    row: KindRow
    title: str
    facts: Sequence[tuple[str, str]]
    spread: Sequence[tuple[str, ...]]
    examples: Sequence[ExampleCard]


def write_report(place: StoragePath, evidence: Evidence, looked: Sequence[tuple[str, Arrays]], factor: int) -> None:
    """Write the report.

    Args:
        looked: the pieces of the third pass, each with its slide.
        factor: converts contributions to what heatmaps show.
    """
    place.write(evidence_page(evidence, looked, factor))


def evidence_page(evidence: Evidence, looked: Sequence[tuple[str, Arrays]], factor: int = 1) -> bytes:
    """Return the report as HTML."""
    maps = [arrays["example/map"] for _, arrays in looked if "example/map" in arrays]
    scale = scale_of(np.concatenate([one.ravel() for one in maps])) if maps else 1.0
    examples = _examples(looked, scale)
    page = render(
        "evidence/page.html",
        title=f"What does the model look at? {evidence.model}",
        evidence=evidence,
        cards=[_card(row, evidence, examples[row.number - 1]) for row in evidence.kinds],
        certainty=[words for side in SIDES if (words := stable_words(evidence, side))],
        trials=[_trial(one) for one in evidence.trials],
        overview=[_overview(row) for row in evidence.kinds],
        against=[] if evidence.against is None else [_against(row) for row in evidence.against.rows],
        not_read=sorted(evidence.not_read.items()),
        legend=colour_scale(scale, "of the explained scalar") if maps else None,
        scale=scale,
        area=area_of(evidence),
    )
    return page.encode()


def _trial(one: TrialRow) -> tuple[str, ...]:
    chosen = "chosen" if one.chosen else ""
    return one.side, str(one.kinds), f"{one.stability:.2f}", f"{one.silhouette:.2f}", chosen


def _overview(row: KindRow) -> tuple[str, ...]:
    change = "–" if row.covering is None else interval(row.covering.difference)
    return (
        capitalised(called(row)),
        row.side,
        shares(row.share),
        shares(row.area),
        "–" if row.lift is None else f"{row.lift:.1f}",
        f"{row.slides} of {row.of_slides}",
        change,
    )


def _card(row: KindRow, evidence: Evidence, examples: Sequence[ExampleCard]) -> KindCard:
    whose = f"{evidence.target}, of its slides" if evidence.level == "slide" else evidence.target
    facts = [
        (f"Share of the evidence {row.side} {evidence.target}", shares(row.share)),
        (f"Share of the {area_of(evidence)}", shares(row.area)),
        ("Lift", "" if row.lift is None else f"{row.lift:.2f}"),
        ("Slides", f"{row.slides} of {row.of_slides} (a hundredth of their evidence at least)"),
        ("Patients", _patients(row)),
        (
            f"Mean probability of {whose}",
            "" if row.probability is None else f"{row.probability:.2f}",
        ),
        ("Lies on", _on(row.suspects)),
        ("Lies on given regions", _on(row.regions)),
        ("Lies in annotated areas", _on(row.annotations)),
        ("Lies on marks", _on(row.marks)),
        *([] if row.covering is None else [(row.covering.how.capitalize(), covering_words(row.covering))]),
    ]
    return KindCard(row, capitalised(called(row)), facts, [_spread(one) for one in row.spread], examples)


def area_of(evidence: Evidence) -> str:
    """Return what places are counted as: tissue area for patch-level models, patches for slide-level models."""
    return "patches" if evidence.level == "slide" else "area"


def _on(shares: Mapping[str, float]) -> str:
    """Return what a kind lies on, and how much of it, in words."""
    return ", ".join(f"{name} {100 * value:.0f}%" for name, value in shares.items() if value >= 0.005)


def _patients(row: KindRow) -> str:
    if row.patients is None:
        return ""
    of_one = "" if row.largest_patient is None else f"; {percent(row.largest_patient)} of it is of one patient"
    return f"{row.patients} of {row.of_patients}{of_one}"


def _against(row: AgainstRow) -> tuple[str, ...]:
    whose = "" if row.cluster is None else str(row.cluster)
    p = "–" if row.p_adjusted is None else p_text(row.p_adjusted)
    there = "" if row.there is None else str(row.there)
    return whose, there, row.side, shares(row.share), shares(row.share_there), shares(row.difference), p, row.change


def _spread(one: Spread) -> tuple[str, ...]:
    groups = ", ".join(
        f"{name}: {100 * one.share[name]:.1f}% ({found} of {of} slides)" for name, (found, of) in one.groups.items()
    )
    p = "one group alone" if one.p is None else p_text(one.p if one.p_adjusted is None else one.p_adjusted)
    return one.by, groups, p


def covering_words(one: Covering) -> str:
    """Return what covering changed, in words."""
    p = "" if one.p_adjusted is None else f", {p_text(one.p_adjusted)}"
    slides = "slide" if one.slides == 1 else "slides"
    if one.how == "removed":
        return (
            f"without its patches the slide's logit changes by {interval(one.change)}, without as many elsewhere by "
            f"{interval(one.elsewhere)}{p}; {one.slides} {slides}"
        )
    return (
        f"the logit changes by {interval(one.change)}, where as much is covered elsewhere by {interval(one.elsewhere)}"
        f"{p}; {one.patches} patches of {one.slides} {slides}"
    )


def shares(share: Share) -> str:
    """Return a share with its interval, in percent."""
    if share.value is None or share.low is None or share.high is None:
        return "–"
    return f"{100 * share.value:.1f}% ({100 * share.low:.1f} to {100 * share.high:.1f})"


def interval(share: Share) -> str:
    """Return a number with its interval."""
    return "–" if share.value is None else f"{number(share.value)} ({number(share.low)} to {number(share.high)})"


def _examples(looked: Sequence[tuple[str, Arrays]], scale: float) -> dict[int, list[ExampleCard]]:
    """Return the examples by kind, extremes last."""
    found: dict[int, list[ExampleCard]] = defaultdict(list)
    for slide, arrays in looked:
        if "example/row" not in arrays:
            continue
        for i, row in enumerate(arrays["example/row"].tolist()):
            rgb = enlarged(arrays["example/rgb"][i])
            title = f"{slide}, patch {int(arrays['example/number'][i])}"
            pictures = [_patch(rgb, arrays, i, title)]
            if "example/map" in arrays:
                pictures.append(overlay(rgb, arrays["example/map"][i], scale, f"{title}: its map"))
            if "example/around" in arrays:
                around = outlined(arrays["example/around"][i], MIDDLE)
                pictures.append(picture(around, f"{title}: the patch in its surroundings"))
            kind = int(arrays["shown/kind"][row])
            found[kind].append(ExampleCard(title, bool(arrays["example/extreme"][i]), pictures))
    for cards in found.values():
        cards.sort(key=lambda card: card.extreme)
    return found


def _patch(rgb: NDArray[np.uint8], arrays: Arrays, number: int, title: str) -> Picture:
    """Return the picture of an example, with its places of the kind outlined unless they fill all of it."""
    cells = arrays["example/cells"][number]
    if cells.all():
        return picture(rgb, f"{title}: the patch")
    return picture(outlined(rgb, cells), f"{title}: the patch with the cluster outlined")


def enlarged(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a picture enlarged by a whole number so that it is large enough to look at."""
    times = -(-LEAST_PX // min(rgb.shape[:2]))
    return rgb.repeat(times, axis=0).repeat(times, axis=1)


def outlined(rgb: NDArray[np.uint8], cells: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return a patch uint8 [h, w, 3] with a line around marked cells [n, m] of a grid over it."""
    height, width = rgb.shape[:2]
    large = np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.NEAREST))
    found, inside = rgb.copy(), large
    for colour in OUTLINE:
        smaller = _eroded(inside)
        found[inside & ~smaller] = colour
        inside = smaller
    return found


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    padded = np.pad(mask, 1)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def stable_words(evidence: Evidence, side: Side) -> str:
    """Return how sure the number of kinds of a side is, in words."""
    chosen = next((one for one in evidence.trials if one.side == side and one.chosen), None)
    if chosen is None:
        return ""
    if evidence.sure[side]:
        return f"{chosen.kinds} kinds {side} it (stability {chosen.stability:.2f}, silhouette {chosen.silhouette:.2f})"
    why = "with other seeds places are sorted otherwise" if chosen.stability < STABLE else "the kinds hardly lie apart"
    return (
        f"{chosen.kinds} kinds {side} it, which is unsure: {why} (stability {chosen.stability:.2f}, silhouette "
        f"{chosen.silhouette:.2f})"
    )
