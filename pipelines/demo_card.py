"""Write a trained demo model: weights, model file and model card."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from safetensors.torch import save

from demo_evaluation import Maps, brier, expected_calibration_error, reliability, roc_auc
from demo_training import Recipe
from wsi_gradcam.models.zoo.nets import PatchCNN


@dataclass(frozen=True)
class Spec:
    """The contents of the model file besides the weights' name and digest."""

    name: str
    builder: str
    classes: tuple[str, str]
    patch_px: int
    mpp: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    license: str
    data: str


@dataclass(frozen=True)
class Result:
    """Maps of one held-out image at both overlaps, and colour's probability of each patch without overlap."""

    name: str
    apart: Maps
    overlapping: Maps
    colour: np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def write_model(out: Path, spec: Spec, model: PatchCNN, card: str) -> None:
    """Write NAME.safetensors, NAME.yaml and NAME.md into ``out``."""
    weights = out / f"{spec.name}.safetensors"
    weights.write_bytes(save(model.state_dict()))
    (out / f"{spec.name}.yaml").write_text(model_file(spec, weights), encoding="utf-8")
    (out / f"{spec.name}.md").write_text(card, encoding="utf-8")


def model_file(spec: Spec, weights: Path) -> str:
    """The model file as YAML."""
    fields = {
        "name": spec.name,
        "source": f"wsi_gradcam.models.zoo.nets:{spec.builder}",
        "weights": weights.name,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "classes": list(spec.classes),
        "patch_px": spec.patch_px,
        "mpp": spec.mpp,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "layer": "features",
        "activation": "softmax",
        "license": spec.license,
        "provenance": {"data": spec.data, "script": f"pipelines/train_demo.py {spec.name}"},
    }
    return yaml.safe_dump(fields, sort_keys=False, width=100)


def map_table(results: Sequence[Result]) -> str:
    """ROC AUC per 16 px cell of each held-out image and of all cells together."""
    rows = [
        "| held out | cells of the class | probability, overlap 0 | Grad-CAM, overlap 0 "
        "| true share, overlap 0 | probability, overlap 0.5 | Grad-CAM, overlap 0.5 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, apart, overlapping in [(r.name, [r.apart], [r.overlapping]) for r in results]:
        rows.append(_map_row(name, apart, overlapping))
    if len(results) > 1:
        rows.append(_map_row("all together", [r.apart for r in results], [r.overlapping for r in results]))
    return "\n".join(rows)


def _map_row(name: str, apart: Sequence[Maps], overlapping: Sequence[Maps]) -> str:
    columns = [[m.probability for m in apart], [m.cam for m in apart], [m.share for m in apart]]
    columns += [[m.probability for m in overlapping], [m.cam for m in overlapping]]
    truth = np.concatenate([m.truth.ravel() for m in apart])
    scores = [roc_auc(truth, np.concatenate([image.ravel() for image in column])) for column in columns]
    return f"| {name} | {truth.mean():.0%} | " + " | ".join(f"{score:.3f}" for score in scores) + " |"


def patch_section(results: Sequence[Result]) -> str:
    """Accuracy, ROC AUC and calibration of held-out patches, beside colour alone."""
    truth = np.concatenate([r.overlapping.patch_share for r in results]) > 0.5
    apart = np.concatenate([r.apart.patch_share for r in results]) > 0.5
    cnn = np.concatenate([r.apart.patch_probability for r in results])
    colour = np.concatenate([r.colour for r in results])
    rows = [
        "| patches | classifier | accuracy | ROC AUC | ECE (10 bins) | Brier |",
        "|---|---|---|---|---|---|",
    ]
    overlapping = np.concatenate([r.overlapping.patch_probability for r in results])
    for label, y, p in (
        (f"{apart.size}, overlap 0", apart, cnn),
        (f"{truth.size}, overlap 0.5", truth, overlapping),
    ):
        rows.append(_patch_row(label, "this model", y, p))
    rows.append(_patch_row(f"{apart.size}, overlap 0", "colour alone", apart, colour))
    gap = np.abs(overlapping - np.concatenate([r.overlapping.patch_share for r in results])).mean()
    rows += [
        "",
        "The probability was trained to be the share of the class in the patch, and is off by",
        f"{gap:.3f} on average (overlap 0.5). Calibration here is against the majority of pixels instead.",
    ]
    bins = ["", "| patches (overlap 0.5) | mean probability | observed share |", "|---|---|---|"]
    bins += [f"| {n} | {mean:.2f} | {share:.2f} |" for n, mean, share in reliability(truth, overlapping)]
    return "\n".join(rows + bins)


def _patch_row(
    label: str,
    classifier: str,
    truth: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
    probability: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
) -> str:
    accuracy = np.mean((probability > 0.5) == truth)
    scores = (
        roc_auc(truth, probability),
        expected_calibration_error(truth, probability),
        brier(truth, probability),
    )
    return f"| {label} | {classifier} | {accuracy:.3f} | " + " | ".join(f"{s:.3f}" for s in scores) + " |"


def model_section(spec: Spec, model: PatchCNN, recipe: Recipe) -> str:
    """Size, input and training of the model."""
    count = sum(p.numel() for p in model.parameters())
    return f"""\
- {count:,} parameters: blocks of 3 x 3 convolution, batch normalisation and ReLU; global average pooling; one
  linear layer.
- Input: {spec.patch_px} px RGB at {spec.mpp} mpp (assumed), float32 in 0..1, minus {list(spec.mean)}, divided by
  {list(spec.std)}.
- Output: logits of {spec.classes[0]}, {spec.classes[1]}; probabilities by softmax.
- Training: {recipe.steps} steps of {recipe.batch} random patches, AdamW (rate {recipe.learning_rate},
  weight decay {recipe.weight_decay}) in one cycle, averaged weights; rotations, reflections, scale, stain
  strength, brightness, blur, noise and JPEG as augmentation; {recipe.glass:.0%} of patches are bare glass.
- Loss: cross entropy between the patch and its share of {spec.classes[1]} pixels, plus
  {recipe.cell_loss:g} times the same for every 8 px cell of the class activation map. The head's weights of
  the two classes are opposite, so that the CAM of one logit is half that of the difference.
- Seeds are fixed. Another machine or library version may produce different bytes and slightly different figures."""
