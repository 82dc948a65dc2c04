"""Evaluate a slide-level model on crops that it never saw: its answers for slides, and its maps against the masks."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from demo_evaluation import Floats, colour_baseline, cut, roc_auc
from mil_slides import WINDOW_PX, Crop, draw_slides, mosaic, save_slide, windows
from wsi_gradcam.api import explain
from wsi_gradcam.demo.run import majority
from wsi_gradcam.results.heatmap import EXPLAINED
from wsi_gradcam.results.run import open_result
from wsi_gradcam.results.slide import SlideResult

CELL_PX = 16  # of the heatmap
TARGET = "tumour"
BAG_METHODS = ("integrated_gradients", "lrp", "gradient_x_input", "one_removed")
MAPS = {
    "chain": f"gradcam: {TARGET}",
    "relevance": f"relevance: {TARGET}",
    "attention": "attention",
    "single": f"probability: {TARGET}",
}
COLOUR = "colour alone"
# One engine on every machine, so that figures are the same.
SETTINGS: dict[str, Any] = {"engine": "eager", "precision": "float32", "batch_size": 32, "heatmap_stride": CELL_PX}


@dataclass(frozen=True)
class JudgedCrop:
    """A held-out crop: the share of tumour, the slide's probability, and ROC AUC by cells of maps and by patches."""

    name: str
    share: float
    probability: float
    maps: dict[str, float]
    patches: dict[str, float]


@dataclass(frozen=True)
class Judged:
    """A group of held-out crops; ``slides`` are (with tumour, probability of tumour) of mosaics of their windows."""

    name: str
    patient: str
    crops: list[JudgedCrop]
    slides: list[tuple[bool, float]] = field(default_factory=list)

    @property
    def auroc(self) -> float:
        """ROC AUC of the answers for slides."""
        return auroc([self])

    @property
    def line(self) -> str:
        """The figures on one line."""
        return f"{self.name}: slides {self.auroc:.3f}, chain {mean_of([self], 'maps', 'chain'):.3f}"

    def to_json(self) -> dict[str, Any]:
        """The figures as plain values; None if there is none."""
        return {**_plain(asdict(self)), "auroc": _plain(self.auroc)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def auroc(judged: Sequence[Judged]) -> float:
    """ROC AUC of the answers for slides of all groups; nan if they are all of one kind."""
    slides = [slide for each in judged for slide in each.slides]
    labels, answers = (np.array([slide[k] for slide in slides]) for k in (0, 1))
    return roc_auc(labels.astype(bool), answers.astype(float)) if slides else float("nan")


def mean_of(judged: Sequence[Judged], table: str, name: str) -> float:
    """The mean of a ROC AUC over crops that have both kinds; nan if none has."""
    found = [getattr(crop, table).get(name, float("nan")) for each in judged for crop in each.crops]
    known = [value for value in found if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


@dataclass(frozen=True)
class Mosaics:
    """The slides that a model is asked about: how many, with how many windows, and the seed of their drawing."""

    count: int
    sizes: tuple[int, int]
    seed: int


def judge(
    model: Path, crops: Sequence[Crop], others: Sequence[Crop], out: Path, mosaics: Mosaics, mpp: float
) -> Judged:
    """Make slides from held-out crops, have them explained, and compare with the masks.

    Args:
        model: the model's file.
        crops: held-out crops of one patient.
        others: crops whose masks train the colour baseline; for a single held-out crop without others there is none.
        out: folder for the slides and their results.
        mosaics: slides of windows, every second one with tumour.
        mpp: micrometres per pixel of the crops.

    Raises:
        ValueError: a slide could not be explained.
    """
    name = crops[0].name if len(crops) == 1 else crops[0].patient
    folder = out / name
    (folder / "crops").mkdir(parents=True, exist_ok=True)
    for crop in crops:
        save_slide(folder / "crops" / f"{crop.name}.tiff", crop.rgb, crop.mask, mpp)
    options = {"overlap": 0.5, "bag_method": BAG_METHODS, "tissue": "everything"}  # there is no glass around a crop
    results = _explained(folder / "crops", model, folder / "results", **options)
    found = []
    for crop in crops:
        teachers = others or [other for other in crops if other is not crop]
        found.append(_judge_crop(results[f"{crop.name}.tiff"], crop, teachers))
    return Judged(name, crops[0].patient, found, _answers(model, crops, folder, mosaics, mpp))


def _explained(slides: Path, model: Path, out: Path, **options: Any) -> dict[str, SlideResult]:
    done = explain(slides, model, out, overwrite=True, **SETTINGS, **options)
    for record in done.failed:
        raise ValueError(f"{record.slide.path}: {record.error}")
    return {slide.id: slide for slide in open_result(out)}


def _answers(
    model: Path, crops: Sequence[Crop], folder: Path, mosaics: Mosaics, mpp: float
) -> list[tuple[bool, float]]:
    """Write mosaics and get the model's answers for them; none if the crops have no windows of a kind."""
    random = np.random.default_rng(mosaics.seed)
    kinds = [[pieces for crop in crops if (pieces := windows(crop, kind, 64, random))] for kind in (False, True)]
    if not all(kinds):
        return []
    both = [*kinds[0], *kinds[1]]
    pieces = [piece for crop in both for piece in crop]
    rows = np.split(np.arange(len(pieces)), np.cumsum([len(crop) for crop in both])[:-1])
    pools = rows[: len(kinds[0])], rows[len(kinds[0]) :]
    labels = {}
    (folder / "mosaics").mkdir(exist_ok=True)
    for number, drawn in enumerate(draw_slides(pools, mosaics.count, random, mosaics.sizes)):
        path = folder / "mosaics" / f"{number:03}-{'tumour' if drawn.label else 'none'}.tiff"
        save_slide(path, *mosaic([pieces[i] for i in drawn.rows], drawn.is_tumour, random), mpp)
        labels[path.name] = drawn.label
    results = _explained(folder / "mosaics", model, folder / "answers")
    return [(label, float(results[name].row[f"slide_probability_{TARGET}"])) for name, label in labels.items()]


def _judge_crop(slide: SlideResult, crop: Crop, others: Sequence[Crop]) -> JudgedCrop:
    table = slide.patches
    corners = table[["y", "x"]].to_numpy()
    rgb, mask = crop.rgb, crop.mask
    boxes = [(slice(y, y + WINDOW_PX), slice(x, x + WINDOW_PX)) for y, x in np.rint(corners).astype(int)]
    share = np.array([mask[box].mean() for box in boxes])
    colour = _colour(others, np.stack([_colours(rgb[box]) for box in boxes]))
    truth, known = majority(mask, CELL_PX), (slide.coverage().values & EXPLAINED) > 0
    maps = {name: np.asarray(slide.heatmap(label).values, float) for name, label in MAPS.items()}
    maps |= {} if colour is None else {COLOUR: _painted(colour, boxes, mask.shape)}
    names = {method: f"{method}_relevance_{TARGET}" for method in BAG_METHODS}
    names |= {"attention": "attention", "single": f"probability_{TARGET}"}
    columns = {name: table[column].to_numpy(float) for name, column in names.items()}
    columns |= {} if colour is None else {COLOUR: colour}
    return JudgedCrop(
        crop.name,
        float(crop.mask.mean()),
        float(slide.row[f"slide_probability_{TARGET}"]),
        {name: roc_auc(truth[known], values[known]) for name, values in maps.items()},
        {name: roc_auc(share > 0.5, values) for name, values in columns.items()},
    )


def _colours(rgb: Any) -> Floats:
    pixels = rgb.reshape(-1, 3) / 255
    return np.concatenate([pixels.mean(axis=0), pixels.std(axis=0)])


def _colour(others: Sequence[Crop], of: Floats) -> Floats | None:
    """Probability of tumour of patches from the mean and spread of R, G, B, learned from the masks of other crops."""
    cuts = [cut(crop.rgb, crop.mask, WINDOW_PX, 0.5) for crop in others]
    truth = np.concatenate([each.share for each in cuts]) > 0.5 if cuts else np.zeros(0, bool)
    if truth.all() or not truth.any():
        return None
    return colour_baseline(np.concatenate([each.colour() for each in cuts]), truth, of)


def _painted(values: Floats, boxes: Sequence[tuple[slice, slice]], shape: tuple[int, ...]) -> Floats:
    """The mean over the patches that cover each cell."""
    total, count = np.zeros((2, *shape))
    for value, box in zip(values, boxes, strict=True):
        total[box] += value
        count[box] += 1
    rows, columns = (np.minimum(np.arange(0, size, CELL_PX) + CELL_PX // 2, size - 1) for size in shape)
    mean: Floats = (total / np.maximum(count, 1))[rows[:, None], columns]
    return mean
