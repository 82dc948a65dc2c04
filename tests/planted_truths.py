"""What the audit must say where the truth is known: a list of truths, each judged anew for every seed.

A seed gives patches, and networks trained from other weights, of its own. `expected` holds the outcomes that are right;
`wrong` those that are a false statement. What is in neither (mostly `unclear`) is a truth that was missed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from tests.planted import (
    PINK,
    SIDE_PX,
    Mask,
    Patches,
    glass_of_scanners,
    marker_only,
    patches,
    subject_of,
    to_images,
    trained,
    untrained,
    with_ink,
)
from tests.planted_models import bent, blinkered, darkness_reader, stain_reader, with_margin
from wsi_gradcam.audit.estimates import compare, estimate
from wsi_gradcam.audit.measures.controls import control_maps, edge_maps, random_maps
from wsi_gradcam.audit.measures.faithfulness import removal_curves
from wsi_gradcam.audit.measures.likeness import resembles
from wsi_gradcam.audit.measures.locality import finite_steps
from wsi_gradcam.audit.measures.plausibility import auroc
from wsi_gradcam.audit.measures.removal import mean_colour, replace_by
from wsi_gradcam.audit.measures.sanity import answer_spread, random_answers, staying_maps
from wsi_gradcam.audit.measures.saturation import saturation
from wsi_gradcam.audit.measures.shortcuts import cover, masking
from wsi_gradcam.audit.measures.stability import Change, as_strong_noise, moves, noise, stain_jitter
from wsi_gradcam.audit.measures.subject import Aim, Subject
from wsi_gradcam.audit.verdict import (
    Outcome,
    depends_on_weights,
    faithful,
    free_of,
    has_learned,
    not_saturated,
    plausible,
    promises_kept,
    quiet_on_glass,
    robust_to,
)
from wsi_gradcam.cam.targets import Target

TUMOUR = Target("tumour", 1)
AS_STRONG, LOUD = as_strong_noise(stain_jitter), partial(noise, levels=80.0)
FIRES: tuple[Outcome, ...] = ("fails",)
HOLDS: tuple[Outcome, ...] = ("holds",)
NO_PRAISE: tuple[Outcome, ...] = ("fails", "unclear")
NO_ALARM: tuple[Outcome, ...] = ("holds", "unclear")


@dataclass(frozen=True)
class Truth:
    """A case, the verdict that is asked, what it must be, and how it is judged with a seed."""

    case: str
    verdict: str
    expected: tuple[Outcome, ...]
    judge: Callable[[int], Outcome]

    @property
    def wrong(self) -> tuple[Outcome, ...]:
        """Outcomes that would be false statements."""
        return ("holds",) if "fails" in self.expected else ("fails",)


Maps = Callable[[Subject, Tensor, Aim, Patches, int], Tensor]


def gradcam(subject: Subject, images: Tensor, aim: Aim, sample: Patches, seed: int) -> Tensor:
    return subject.maps(images, aim)


def edges(subject: Subject, images: Tensor, aim: Aim, sample: Patches, seed: int) -> Tensor:
    return edge_maps(images, (8, 8))


def chance(subject: Subject, images: Tensor, aim: Aim, sample: Patches, seed: int) -> Tensor:
    return random_maps((8, 8), range(10_000 * seed + 5000, 10_000 * seed + 5000 + len(images)))


def annotation(subject: Subject, images: Tensor, aim: Aim, sample: Patches, seed: int) -> Tensor:
    return torch.from_numpy(cover(sample.disc, (8, 8))).float()


def of_tumour(seed: int, marked: str) -> Patches:
    """40 patches of class 1; where there are markers, with ink that means nothing, as an edge map would find them."""
    whole = patches(80, seed, marked)
    rows = whole.label == 1
    sample = Patches(whole.rgb[rows], whole.label[rows], whole.disc[rows], whole.marker[rows])
    return sample if marked == "none" else with_ink(sample, seed)


def faithfulness(
    network: Callable[[int], nn.Module], make: Maps, marked: str = "none", slides: int = 10
) -> Callable[[int], Outcome]:
    def judge(seed: int) -> Outcome:
        sample, subject = of_tumour(seed, marked), subject_of(network(seed))
        images = subject.images(sample.rgb)
        aim = subject.aim(images, TUMOUR)
        maps = {"map": make(subject, images, aim, sample, seed)}
        maps |= control_maps(images, (8, 8), range(10_000 * seed, 10_000 * seed + len(images)))
        replace = replace_by(images, mean_colour(images))
        curves = removal_curves(subject, images, aim, maps, replace, torch.linspace(0, 1, 9), seed)
        scores = {name: curve.score.numpy() for name, curve in curves.items()}
        return faithful(scores.pop("map"), scores, np.arange(len(images)) % slides, seed=seed).outcome

    return judge


def plausibility(network: Callable[[int], nn.Module], make: Maps, marked: str = "none") -> Callable[[int], Outcome]:
    def judge(seed: int) -> Outcome:
        sample, subject = of_tumour(seed, marked), subject_of(network(seed))
        images = subject.images(sample.rgb)
        maps = make(subject, images, subject.aim(images, TUMOUR), sample, seed).numpy()
        area = auroc(maps, cover(sample.disc, (8, 8)) > 0.5)
        return plausible(estimate(area, np.arange(len(images)) // 4, seed=seed)).outcome

    return judge


def randomised(method: str, network: Callable[[int], nn.Module]) -> Callable[[int], Outcome]:
    def judge(seed: int) -> Outcome:
        sample, subject = patches(16, seed), subject_of(network(seed), methods=(method,))
        images = subject.images(sample.rgb[sample.label == 1])
        stay = staying_maps(subject, images, subject.aim(images, TUMOUR), method, seed=1_000_000 * seed)
        return depends_on_weights(
            estimate(stay.ravel(), np.repeat(np.arange(len(stay)), stay.shape[1]), seed=seed)
        ).outcome

    return judge


def model_free(make: Maps) -> Callable[[int], Outcome]:
    def judge(seed: int) -> Outcome:
        sample, subject = of_tumour(seed, "none"), subject_of(untrained(seed))
        images = subject.images(sample.rgb)
        maps = make(subject, images, subject.aim(images, TUMOUR), sample, seed).numpy()
        return depends_on_weights(estimate(resembles(maps, maps.copy(), seed), range(len(maps)), seed=seed)).outcome

    return judge


def learned(network: Callable[[int], nn.Module], marked: str = "none") -> Callable[[int], Outcome]:
    def judge(seed: int) -> Outcome:
        subject = subject_of(network(seed))
        images = subject.images(patches(40, seed, marked).rgb)
        others = answer_spread(random_answers(subject, images, seed=1_000_000 * seed))
        return has_learned(float(answer_spread(subject.answers(images))), others.numpy()).outcome

    return judge


def steps(story: str) -> Callable[[int], Outcome]:
    def judge(seed: int) -> Outcome:
        subject, images = bent(story, seed)
        aim = subject.aim(images, TUMOUR)
        found = finite_steps(subject, images, aim, subject.maps(images, aim), mean_colour(images))
        return promises_kept(estimate(found.worth, range(len(images)), seed=seed)).outcome

    return judge


def saturated(margin: float, share: float) -> Callable[[int], Outcome]:
    def judge(seed: int) -> Outcome:
        rgb = patches(40, seed).rgb
        subject = subject_of(with_margin(to_images(rgb), margin, share, seed))
        images = subject.images(rgb)
        found = saturation(subject, images, subject.aim(images, TUMOUR))
        shares = (estimate(part, np.arange(40) // 4, seed=seed) for part in (found.saturated, found.silent))
        return not_saturated(*shares).outcome

    return judge


def changed(network: Callable[[int], nn.Module], change: Change, control: Change) -> Callable[[int], Outcome]:
    def judge(seed: int) -> Outcome:
        rgb, subject = patches(40, seed).rgb, subject_of(network(seed))
        aim = subject.aim(subject.images(rgb), TUMOUR)
        first, second = (
            moves(subject, rgb, aim, one, repeats=3, seeds=range(start, start + 40)).flips
            for one, start in ((change, 100 * seed), (control, 100 * seed + 50))
        )
        return robust_to("another stain", compare(first, second, range(40), seed=seed), "noise").outcome

    return judge


def hidden(network: Callable[[int], nn.Module], square: bool = False) -> Callable[[int], Outcome]:
    """The marker, or a square anywhere, hidden behind plain tissue: another colour would be news of its own."""

    def judge(seed: int) -> Outcome:
        sample, subject = patches(40, seed, "none" if square else "all"), subject_of(network(seed))
        images = subject.images(sample.rgb)
        pink = (torch.tensor(PINK) / 127.5 - 1)[:, None, None]
        masks = random_squares(40, seed) if square else sample.marker
        found = masking(subject, images, subject.aim(images, TUMOUR), masks, replace_by(images, pink), seed=seed)
        drop = compare(found.size, found.control_size, range(40), seed=seed)
        return free_of("pen", drop, compare(found.flips, found.control_flips, range(40), seed=seed)).outcome

    return judge


def random_squares(count: int, seed: int) -> Mask:
    """Of 8 px a side, bool [count, 32, 32]."""
    masks = np.zeros((count, SIDE_PX, SIDE_PX), np.bool_)
    for mask, (y, x) in zip(masks, np.random.default_rng(seed).integers(0, SIDE_PX - 7, (count, 2)), strict=True):
        mask[y : y + 8, x : x + 8] = True
    return masks


def on_glass(label: int) -> Callable[[int], Outcome]:
    def judge(seed: int) -> Outcome:
        subject = subject_of(trained(seed=seed, glass=label))
        called = subject.answers(subject.images(glass_of_scanners(24, seed))).argmax(dim=1).numpy()
        return quiet_on_glass("tumour", estimate(called == 1, range(24), seed=seed)).outcome

    return judge


def honest(seed: int) -> nn.Module:
    return trained(seed=seed)


def deep(seed: int) -> nn.Module:
    return trained(seed=seed, deep=True)


TRUTHS = (
    Truth("trained model, Grad-CAM", "faithful", HOLDS, faithfulness(honest, gradcam)),
    Truth("marker-only model, Grad-CAM", "faithful", HOLDS, faithfulness(lambda _: marker_only(), gradcam, "tumour")),
    Truth(
        "model trained on pen, Grad-CAM",
        "faithful",
        HOLDS,
        faithfulness(lambda seed: trained("tumour", seed), gradcam, "tumour"),
    ),
    Truth("trained model, Grad-CAM, 7 slides", "faithful", HOLDS, faithfulness(honest, gradcam, slides=7)),
    Truth(
        "marker-only model, random map, 7 slides",
        "faithful",
        FIRES,
        faithfulness(lambda _: marker_only(), chance, "tumour", slides=7),
    ),
    Truth(
        "marker-only model, map in the shape of the annotation",
        "faithful",
        FIRES,
        faithfulness(lambda _: marker_only(), annotation, "tumour"),
    ),
    Truth("marker-only model, random map", "faithful", FIRES, faithfulness(lambda _: marker_only(), chance, "tumour")),
    Truth("marker-only model, edge map", "faithful", NO_PRAISE, faithfulness(lambda _: marker_only(), edges, "tumour")),
    Truth("trained model, Grad-CAM", "plausible", HOLDS, plausibility(honest, gradcam)),
    Truth(
        "marker-only model, map in the shape of the annotation",
        "plausible",
        HOLDS,
        plausibility(lambda _: marker_only(), annotation, "tumour"),
    ),
    Truth(
        "marker-only model, Grad-CAM", "plausible", NO_PRAISE, plausibility(lambda _: marker_only(), gradcam, "tumour")
    ),
    Truth("trained model, Grad-CAM", "depends_on_weights", HOLDS, randomised("gradcam", deep)),
    Truth("trained model, guided backprop", "depends_on_weights", FIRES, randomised("guided_backprop", deep)),
    Truth("edge map", "depends_on_weights", FIRES, model_free(edges)),
    Truth("map in the shape of the annotation", "depends_on_weights", FIRES, model_free(annotation)),
    Truth("trained model", "has_learned", HOLDS, learned(honest)),
    Truth("model trained on pen", "has_learned", HOLDS, learned(lambda seed: trained("tumour", seed), "tumour")),
    Truth("untrained model", "has_learned", FIRES, learned(untrained)),
    Truth("untrained deep model", "has_learned", FIRES, learned(lambda seed: untrained(seed, deep=True))),
    Truth("straight on", "promises_kept", HOLDS, steps("straight")),
    Truth("plateau ahead", "promises_kept", FIRES, steps("plateau")),
    Truth("cliff ahead", "promises_kept", FIRES, steps("cliff")),
    Truth("logits apart by 20 or more", "not_saturated", FIRES, saturated(20.0, 0.0)),
    Truth("logits apart by 2 or less", "not_saturated", HOLDS, saturated(2.0, 1.0)),
    Truth("model that reads the stain", "robust_to", FIRES, changed(lambda _: stain_reader(), stain_jitter, AS_STRONG)),
    Truth(
        "model that reads darkness far from doubt",
        "robust_to",
        HOLDS,
        changed(lambda _: darkness_reader(), stain_jitter, AS_STRONG),
    ),
    Truth("trained model, strong noise against as strong noise", "robust_to", NO_ALARM, changed(honest, LOUD, LOUD)),
    Truth("model trained on pen", "free_of", FIRES, hidden(lambda seed: trained("tumour", seed))),
    Truth("marker-only model", "free_of", FIRES, hidden(lambda _: marker_only())),
    Truth("model trained with pen on either class", "free_of", NO_ALARM, hidden(lambda seed: trained("random", seed))),
    Truth("model that no pen reaches", "free_of", HOLDS, hidden(blinkered)),
    Truth("trained model, square at a random place", "free_of", NO_ALARM, hidden(honest, square=True)),
    Truth("model trained to call glass tumour", "quiet_on_glass", FIRES, on_glass(1)),
    Truth("model trained to call glass other", "quiet_on_glass", HOLDS, on_glass(0)),
)
