"""Cases of which the truth is known, and the verdict that a user of the audit gets on each.

A case is a model and patches that are given to `wsi_gradcam.audit_images`, and nothing below it is called; the outcome
is that of a row of its verdicts. Of a truth `expected` are the outcomes that are right, `wrong` those that are a false
statement. An outcome in neither (mostly `unclear`) is a truth that was missed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from torch import nn

from tests.planted import (
    SIDE_PX,
    Mask,
    Patches,
    as_model,
    glass_colours,
    marker_only,
    patches,
    to_images,
    trained,
    untrained,
    with_ink,
)
from tests.planted_models import (
    Annotation,
    Chance,
    Coin,
    Edges,
    Facade,
    bent,
    blinkered,
    darkness_reader,
    stain_reader,
    with_margin,
)
from wsi_gradcam import audit_images

Outcome = Literal["holds", "fails", "unclear"]
FIRES: tuple[Outcome, ...] = ("fails",)
HOLDS: tuple[Outcome, ...] = ("holds",)
NO_PRAISE: tuple[Outcome, ...] = ("fails", "unclear")
NO_ALARM: tuple[Outcome, ...] = ("holds", "unclear")


@dataclass(frozen=True)
class Case:
    """A network and its patches as a user gives them to the audit, with further arguments of `audit_images`."""

    network: nn.Module
    rgb: np.ndarray[Any, np.dtype[np.uint8]]
    slides: int | None = None
    arguments: dict[str, Any] | None = None


@dataclass(frozen=True)
class About:
    """The keys of a verdict's row; those that it has not are None."""

    question: str
    method: str | None = None
    change: str | None = None
    suspect: str | None = None
    label: str | None = None

    def __str__(self) -> str:
        glass = f"bare glass called {self.label}" if self.label else ""
        return f"{self.question}, {self.method or self.change or self.suspect or glass or 'model'}"

    def matches(self, row: object) -> bool:
        return all(getattr(row, key) == value for key, value in asdict(self).items())


@dataclass(frozen=True)
class Truth:
    """A case, the verdict on it that is looked up, its expected outcomes, and the function that makes it of a seed."""

    case: str
    about: About
    expected: tuple[Outcome, ...]
    make: Callable[[int], Case]

    @property
    def name(self) -> str:
        return f"{self.about}: {self.case}"

    @property
    def wrong(self) -> tuple[Outcome, ...]:
        """Outcomes that would be false statements."""
        return ("holds",) if "fails" in self.expected else ("fails",)

    def judge(self, seed: int) -> Outcome:
        """Return the outcome of the verdict."""
        case = self.make(seed)
        groups = None if case.slides is None else [f"slide {i % case.slides}" for i in range(len(case.rgb))]
        found = audit_images(
            case.rgb,
            as_model(case.network),
            target="tumour",
            groups=groups,
            only=[self.about.question],
            seed=seed,
            **(case.arguments or {}),
        )
        (outcome,) = (row.outcome for row in found.verdicts if self.about.matches(row))
        return outcome


def of_tumour(seed: int, marked: str, count: int = 40) -> Patches:
    """Patches of class 1; where there are markers, with ink that means nothing, as an edge map would find them."""
    whole = patches(2 * count, seed, marked)
    rows = whole.label == 1
    sample = Patches(whole.rgb[rows], whole.label[rows], whole.disc[rows], whole.marker[rows])
    return sample if marked == "none" else with_ink(sample, seed)


Network = Callable[[int], nn.Module]


def honest(seed: int) -> nn.Module:
    return trained(seed=seed)


def deep(seed: int) -> nn.Module:
    return trained(seed=seed, deep=True)


def of_pen(seed: int) -> nn.Module:
    return trained("tumour", seed)


def of_marker(seed: int) -> nn.Module:
    return marker_only()


def facade(planted: Callable[[], nn.Module], answering: Network) -> Network:
    return lambda seed: Facade(planted(), answering(seed)).eval()


def tumours(network: Network, marked: str = "none", slides: int = 10, **arguments: Any) -> Callable[[int], Case]:
    """8 patches of each slide, as many as are audited at a time."""
    return lambda seed: Case(network(seed), of_tumour(seed, marked, 8 * slides).rgb, slides, arguments)


def annotated(network: Network, marked: str = "none") -> Callable[[int], Case]:
    def make(seed: int) -> Case:
        sample = of_tumour(seed, marked)
        return Case(network(seed), sample.rgb, 10, {"annotated": sample.disc})

    return make


def of_both(network: Network, count: int, marked: str = "none") -> Callable[[int], Case]:
    """Patches of both classes."""
    return lambda seed: Case(network(seed), patches(count, seed, marked).rgb)


def steps(story: str) -> Callable[[int], Case]:
    return lambda seed: Case(*bent(story, seed))


def saturated(margin: float, share: float) -> Callable[[int], Case]:
    def make(seed: int) -> Case:
        rgb = patches(40, seed).rgb
        return Case(with_margin(to_images(rgb), margin, share, seed), rgb, 10)

    return make


def marked_by_pen(network: Network, square: bool = False) -> Callable[[int], Case]:
    """The marker, or a square anywhere, is the region that should not decide."""

    def make(seed: int) -> Case:
        sample = patches(40, seed, "none" if square else "all")
        masks = random_squares(40, seed) if square else sample.marker
        return Case(network(seed), sample.rgb, None, {"regions": {"pen": masks}})

    return make


def random_squares(count: int, seed: int) -> Mask:
    """Of 8 px a side, bool [count, 32, 32]."""
    masks = np.zeros((count, SIDE_PX, SIDE_PX), np.bool_)
    for mask, (y, x) in zip(masks, np.random.default_rng(seed).integers(0, SIDE_PX - 7, (count, 2)), strict=True):
        mask[y : y + 8, x : x + 8] = True
    return masks


def on_glass(label: int) -> Callable[[int], Case]:
    """A slide whose glass has one scanner's colour."""

    def make(seed: int) -> Case:
        colour = tuple(glass_colours(1, seed)[0].tolist())
        return Case(trained(seed=seed, glass=label), patches(8, seed).rgb, None, {"glass": colour})

    return make


FAITHFUL, PLAUSIBLE, SANE, LOCAL = (
    About(question, method="gradcam") for question in ("faithfulness", "plausibility", "sanity", "locality")
)
GUIDED = About("sanity", method="guided_backprop")
LEARNED, SATURATED = About("sanity"), About("saturation")
STAIN = About("stability", change="stain")
PEN = About("shortcuts", suspect="pen (given)")
GLASS = About("shortcuts", label="tumour")
TRUTHS = (
    Truth("trained model", FAITHFUL, HOLDS, tumours(honest)),
    Truth("marker-only model", FAITHFUL, HOLDS, tumours(of_marker, "tumour")),
    Truth("model trained on pen", FAITHFUL, HOLDS, tumours(of_pen, "tumour")),
    Truth("trained model, 7 slides", FAITHFUL, HOLDS, tumours(honest, slides=7)),
    Truth(
        "marker-only model behind a random map, 7 slides",
        FAITHFUL,
        FIRES,
        tumours(facade(Chance, of_marker), "tumour", 7),
    ),
    Truth(
        "marker-only model behind a map in the shape of the annotation",
        FAITHFUL,
        FIRES,
        tumours(facade(Annotation, of_marker), "tumour"),
    ),
    Truth("marker-only model behind a random map", FAITHFUL, FIRES, tumours(facade(Chance, of_marker), "tumour")),
    Truth("marker-only model behind an edge map", FAITHFUL, NO_PRAISE, tumours(facade(Edges, of_marker), "tumour")),
    Truth("trained model", PLAUSIBLE, HOLDS, annotated(honest)),
    Truth(
        "marker-only model behind a map in the shape of the annotation",
        PLAUSIBLE,
        HOLDS,
        annotated(facade(Annotation, of_marker), "tumour"),
    ),
    Truth("marker-only model", PLAUSIBLE, NO_PRAISE, annotated(of_marker, "tumour")),
    Truth("trained model", SANE, HOLDS, tumours(deep, slides=1)),
    Truth("trained model", GUIDED, FIRES, tumours(deep, slides=2, method="guided_backprop")),
    Truth("trained model behind an edge map", SANE, FIRES, tumours(facade(Edges, honest), slides=1)),
    Truth(
        "model trained on pen behind a map in the shape of the annotation",
        SANE,
        FIRES,
        tumours(facade(Annotation, of_pen), "tumour", 1),
    ),
    Truth("trained model", LEARNED, HOLDS, of_both(honest, 24)),
    Truth("model trained on pen", LEARNED, HOLDS, of_both(of_pen, 24, "tumour")),
    Truth("untrained model", LEARNED, FIRES, of_both(untrained, 24)),
    Truth("untrained deep model", LEARNED, FIRES, of_both(lambda seed: untrained(seed, deep=True), 24)),
    Truth("straight on", LOCAL, HOLDS, steps("straight")),
    Truth("plateau ahead", LOCAL, FIRES, steps("plateau")),
    Truth("cliff ahead", LOCAL, FIRES, steps("cliff")),
    Truth("logits apart by 20 or more", SATURATED, FIRES, saturated(20.0, 0.0)),
    Truth("logits apart by 2 or less", SATURATED, HOLDS, saturated(2.0, 1.0)),
    Truth("model that reads the stain", STAIN, FIRES, of_both(lambda _: stain_reader(), 40)),
    Truth("model that reads darkness far from doubt", STAIN, HOLDS, of_both(lambda _: darkness_reader(), 40)),
    Truth("model that tosses a coin for each picture", STAIN, NO_ALARM, of_both(lambda _: Coin().eval(), 40)),
    Truth("model trained on pen", PEN, FIRES, marked_by_pen(of_pen)),
    Truth("marker-only model", PEN, FIRES, marked_by_pen(of_marker)),
    Truth(
        "model trained with pen on either class",
        PEN,
        NO_ALARM,
        marked_by_pen(lambda seed: trained("random", seed)),
    ),
    Truth("model that no pen reaches", PEN, HOLDS, marked_by_pen(blinkered)),
    Truth("trained model, square at a random place", PEN, NO_ALARM, marked_by_pen(honest, square=True)),
    Truth("model trained to call glass tumour", GLASS, FIRES, on_glass(1)),
    Truth("model trained to call glass other", GLASS, HOLDS, on_glass(0)),
)
