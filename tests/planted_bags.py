"""Slide-level models of which the truth is known, and the verdict that a user of the audit gets on each.

A case is a model and bags of features that are given to `wsi_gradcam.audit_bags`, and nothing below it is called. See
`tests.planted_truths` for what a truth is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.planted_truths import FIRES, HOLDS, NO_ALARM, About, Outcome
from wsi_gradcam import audit_bags

SLIDES, PATCHES, D = 40, 30, 6
IG, SINGLE, REMOVED, ATTENTION = "integrated_gradients", "single", "one_removed", "attention"
State = dict[str, Tensor]
Bags = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class BagCase:
    """A model, a module or the state dict of attention MIL, and bags as a user gives them to the audit."""

    model: nn.Module | State
    bags: Bags
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BagTruth:
    """As `tests.planted_truths.Truth`, of a slide-level model."""

    case: str
    about: About
    expected: tuple[Outcome, ...]
    make: Callable[[int], BagCase]

    @property
    def name(self) -> str:
        return f"slides, {self.about}: {self.case}"

    @property
    def wrong(self) -> tuple[Outcome, ...]:
        """Outcomes that would be false statements."""
        return ("holds",) if "fails" in self.expected else ("fails",)

    def judge(self, seed: int) -> Outcome:
        """Return the outcome of the verdict."""
        case = self.make(seed)
        asked: dict[str, Any] = {"only": [self.about.question], "target": "1", "seed": seed, **case.arguments}
        asked["method"] = self.about.method or asked.get("method", SINGLE)
        if isinstance(case.model, nn.Module):
            found = audit_bags(case.bags, case.model, **asked)
        else:
            with tempfile.TemporaryDirectory() as folder:
                found = audit_bags(case.bags, written(case.model, Path(folder)), **asked)
        (outcome,) = (row.outcome for row in found.verdicts if self.about.matches(row))
        return outcome


def written(state: State, folder: Path) -> Path:
    """Write attention MIL as a model file with its state dict beside it."""
    torch.save(state, folder / "abmil.pt")
    path = folder / "slides.yaml"
    path.write_text("aggregator: {source: abmil, weights: abmil.pt}\n", encoding="utf-8")
    return path


def unit(k: int, scale: float = 1.0) -> list[float]:
    return [scale * float(k == j) for j in range(D)]


def pooling(attended: int, used: int, sharp: float = 3.0) -> State:
    """Attention to one feature, and a logit of the mean of another, less a third of its value on one patch."""
    return {
        "attention.0.weight": torch.tensor([unit(attended)]),
        "attention.2.weight": torch.tensor([[sharp]]),
        "classifier.weight": torch.tensor([unit(used, -1.0), unit(used)]),
    }


def bags(seed: int, *planted: tuple[int, int], slides: int = SLIDES) -> Bags:
    """Bags of small noise, in each of which as many patches have a planted feature: (feature, patches)."""
    random = np.random.default_rng(seed)
    found = {}
    for slide in range(slides):
        bag = random.normal(scale=0.05, size=(PATCHES, D)).astype(np.float32)
        rows = random.permutation(PATCHES)
        for feature, count in planted:
            chosen, rows = rows[:count], rows[count:]
            bag[chosen, feature] += 1
        found[f"slide {slide}"] = bag
    return found


class Both(nn.Module):
    """Calls a bag 1 in which both kinds of patches are, each of which alone says nothing."""

    def forward(self, x: Tensor) -> Tensor:
        both = (x[:, 0].amax() + x[:, 1].amax() - 1.5).relu() - 0.1
        return torch.stack([-both, both])


class Trained(nn.Module):
    """Attention MIL of eight numbers, of random weights."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.score, self.head = nn.Linear(D, 8), nn.Linear(8, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        values = self.embed(x).relu()
        logits: Tensor = self.head(self.score(values.tanh()).softmax(dim=0).T @ values)[0]
        return logits


def trained(seed: int, given: Bags, labels: NDArray[np.int64]) -> nn.Module:
    """The same, taught which bags are of class 1."""
    network = Trained(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.02)
    whole, wanted = [torch.from_numpy(bag) for bag in given.values()], torch.from_numpy(labels)
    for _ in range(80):
        optimiser.zero_grad()
        logits = torch.stack([network(bag) for bag in whole])
        torch.autograd.backward(nn.functional.cross_entropy(logits, wanted))
        optimiser.step()
    return network.requires_grad_(False)


def of_both_classes(
    seed: int, marker: str = "", slides: int = SLIDES
) -> tuple[Bags, NDArray[np.int64], dict[str, NDArray[np.bool_]]]:
    """Bags of which every other one has five patches of tumour (feature 0), and where there is a marker (feature 1).

    It is on three patches: of the `tumour` slides, of `either`, or of none.
    """
    random = np.random.default_rng([seed, 7])
    labels = np.arange(slides) % 2
    given = bags(seed, slides=slides)
    masks = {}
    for (name, bag), label in zip(given.items(), labels.tolist(), strict=True):
        rows = random.permutation(PATCHES)
        if label and marker != "tumour":
            bag[rows[:5], 0] += 1
        mask = np.zeros(PATCHES, np.bool_)
        if marker == "either" or (marker == "tumour" and label):
            mask[rows[5:8]] = True
            bag[rows[5:8], 1] += 1
        masks[name] = mask
    return given, labels, masks


def fixed(model: nn.Module | State, *planted: tuple[int, int]) -> Callable[[int], BagCase]:
    return lambda seed: BagCase(model, bags(seed, *planted))


def learned(seed: int) -> BagCase:
    given, labels, _ = of_both_classes(seed)
    return BagCase(trained(seed, given, labels), of_both_classes(seed + 50_000, slides=16)[0])


def untrained(seed: int) -> BagCase:
    return BagCase(Trained(seed).requires_grad_(False), of_both_classes(seed, slides=16)[0])


def of_a_site(marker: str) -> Callable[[int], BagCase]:
    """A model taught with a marker on slides of tumour, or on either kind, and asked of slides that all have it."""

    def make(seed: int) -> BagCase:
        given, labels, _ = of_both_classes(seed, marker)
        asked, _, masks = of_both_classes(seed + 50_000, "either")
        return BagCase(trained(seed, given, labels), asked, {"regions": {"marker": masks}, "target": "predicted"})

    return make


def annotated(used: int) -> Callable[[int], BagCase]:
    """A model that uses one feature, and an annotation of the patches that have feature 0."""

    def make(seed: int) -> BagCase:
        given = bags(seed, (0, 5), (1, 5))
        shares = {name: (bag[:, 0] > 0.5).astype(np.float64) for name, bag in given.items()}
        return BagCase(pooling(used, used), given, {"annotated": shares})

    return make


def faithful(method: str) -> About:
    return About("faithfulness", method)


MARKER = About("shortcuts", suspect="marker (given)")
BAG_TRUTHS = (
    *(BagTruth("looks at one patch", faithful(name), HOLDS, fixed(pooling(0, 0), (0, 1))) for name in (IG, ATTENTION)),
    BagTruth("looks at one patch", About("sufficiency", IG), HOLDS, fixed(pooling(0, 0), (0, 1))),
    BagTruth("counts", faithful(IG), HOLDS, fixed(pooling(5, 0, 0.0), (0, 6))),
    BagTruth("counts", faithful(ATTENTION), FIRES, fixed(pooling(5, 0, 0.0), (0, 6))),
    BagTruth("needs two kinds together", faithful(REMOVED), HOLDS, fixed(Both(), (0, 1), (1, 1))),
    BagTruth("needs two kinds together", faithful(SINGLE), FIRES, fixed(Both(), (0, 1), (1, 1))),
    BagTruth("attention where nothing is used", faithful(IG), HOLDS, fixed(pooling(1, 0, 1.5), (1, 3), (0, 3))),
    BagTruth("attention where nothing is used", faithful(ATTENTION), FIRES, fixed(pooling(1, 0, 1.5), (1, 3), (0, 3))),
    BagTruth("trained aggregator", About("sanity"), HOLDS, learned),
    BagTruth("untrained aggregator", About("sanity"), FIRES, untrained),
    BagTruth("trained with a marker on tumour", MARKER, FIRES, of_a_site("tumour")),
    BagTruth("trained with a marker on either class", MARKER, NO_ALARM, of_a_site("either")),
    BagTruth("uses what is annotated", About("plausibility", IG), HOLDS, annotated(0)),
    BagTruth("uses what is annotated", About("plausibility"), HOLDS, annotated(0)),
    BagTruth("uses something else than is annotated", About("plausibility"), FIRES, annotated(1)),
)
