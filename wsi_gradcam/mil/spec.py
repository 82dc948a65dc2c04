"""`SlideModelSpec`: everything about a slide-level model besides its weights, as one YAML file. Needs no torch.

A slide-level model consists of an encoder, which computes a feature vector for each patch, and an aggregator, which
turns all of them into one answer (multiple-instance learning).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import psutil
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, PrivateAttr, ValidationError, field_validator

from wsi_gradcam.errors import BagSizeError, ModelError, did_you_mean, quoted, shortened
from wsi_gradcam.models.spec import (
    MAX_CLASSES,
    RANDOM,
    ModelSpec,
    Word,
    explain_validation,
    read_spec,
    read_values,
    spec_in,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

NETWORKS = ("abmil", "clam", "dsmil", "transmil")  # implemented here; their weights are a state dict
FORMS = (
    f"{', '.join(NETWORKS)}, mil-lab:FOLDER (config.json and model.safetensors), torchscript:FILE or module:function"
)
# Bag methods: those with coefficients c_i [D], whose product with the features is the relevance, and those for patches
# alone.
CHAINED = ("integrated_gradients", "gradient_x_input", "lrp")
BAG_METHODS = (*CHAINED, "one_removed", "shapley")
SlideActivation = Literal["softmax", "sigmoid", "none", "hazard"]


class AggregatorSpec(BaseModel):
    """The part of a slide-level model that turns feature vectors into the slide's logits.

    Attributes:
        source: `abmil`, `clam`, `dsmil`, `transmil`, `mil-lab:FOLDER`, `torchscript:FILE` or `module:function`.
        weights: the state dict of the first four, beside the model file; the others contain it.
        sha256: that of the weights file, else of the source's file, else of a function's code.
        heads, landmarks: for a TransMIL, if its weights do not show them (no `res_conv`) or training changed them; the
            landmarks are half the width unless given, as in its authors' code.
        value_activation: what follows DSMIL's `v`, in which versions of its code differ.
        logits: DSMIL's answer is that of its `bag` classifier, or the `mean` of that and the critical patches' own.
        output, feature_dim: for a program: which of its outputs are the logits (key or position), and the length of a
            feature vector; detected if left out.
        folder: where relative paths start; not part of the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Annotated[str, Field(min_length=3, max_length=5000)]
    weights: Annotated[str, Field(max_length=5000)] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    heads: Annotated[PositiveInt, Field(le=1024)] | None = None
    landmarks: Annotated[PositiveInt, Field(le=8192)] | None = None
    value_activation: Literal["relu", "none"] | None = None
    logits: Literal["bag", "mean"] | None = None
    output: Word | int | None = None
    feature_dim: Annotated[PositiveInt, Field(le=1 << 20)] | None = None
    folder: Path = Field(default=Path(), exclude=True)

    @property
    def kind(self) -> str:
        """The source's kind: one of `NETWORKS`, `mil-lab`, `torchscript` or `function`."""
        kind = self.source.partition(":")[0]
        return kind if kind in (*NETWORKS, "mil-lab", "torchscript") else "function"

    @property
    def argument(self) -> str:
        """The part of `source` after the kind; all of it for a function."""
        return self.source if self.kind == "function" else self.source.partition(":")[2]

    @property
    def runs_code(self) -> bool:
        """Whether loading it runs code that it contains."""
        return self.kind in ("torchscript", "function")

    @field_validator("source")
    @classmethod
    def _known(cls, value: str) -> str:
        kind, colon, argument = value.partition(":")
        if kind in NETWORKS and colon:
            raise ValueError(f"{kind} takes nothing after a colon; give its state dict with 'weights:'")
        if kind not in NETWORKS and not argument:
            near = did_you_mean(kind, (*NETWORKS, "mil-lab", "torchscript"))
            raise ValueError(f"expected {FORMS}{near and f'; {near}'}")
        return value


class SlideModelSpec(BaseModel):
    """A model file of a slide-level model.

    Attributes:
        name: its name in results.
        encoder: the part that turns a patch into a feature vector, as in a patch model's file; its output is the
            vector. None: features come from elsewhere.
        aggregator: the part that turns all feature vectors into the slide's logits.
        classes: names of the logits, in order; for `hazard`, those of time intervals.
        activation: how logits become probabilities; `none` is a regression, `hazard` discrete-time survival.
        license, provenance: kept with the results.
        folder: where relative paths start; not part of the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Annotated[str, Field(min_length=1, max_length=1000)]
    encoder: ModelSpec | None = None
    aggregator: AggregatorSpec
    classes: Annotated[tuple[Word, ...], Field(max_length=MAX_CLASSES)] | None = None
    activation: SlideActivation = "softmax"
    license: str | None = None
    provenance: Any = None
    folder: Path = Field(default=Path(), exclude=True)
    _trusted: bool = PrivateAttr(default=False)  # as in `ModelSpec`: no file can set it

    @field_validator("classes", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return ModelSpec._names(value)

    @field_validator("classes")
    @classmethod
    def _unique(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return ModelSpec._unique(value)

    @property
    def weights(self) -> str | None:
        """The aggregator's weights; "random" if the encoder is untrained."""
        return RANDOM if self.encoder is not None and self.encoder.weights == RANDOM else self.aggregator.weights

    @property
    def runs_code(self) -> bool:
        """Whether loading the model runs code that it contains: use only models from people you trust."""
        return self.aggregator.runs_code or (self.encoder is not None and self.encoder.runs_code)

    @property
    def trusted(self) -> bool:
        """Whether the code that it contains may run, see `trusting`."""
        return self._trusted

    def trusting(self, trust_code: bool = True) -> SlideModelSpec:
        """Return the specification with permission to run the code of encoder and aggregator, if that is given."""
        if not trust_code or self._trusted:
            return self
        trusted = self.model_copy(update={"encoder": self.encoder and self.encoder.trusting()})
        trusted._trusted = True
        return trusted

    def resolved(self) -> SlideModelSpec:
        """Return the specification with absolute folders, because workers may run in another one."""
        changed: dict[str, Any] = {"folder": self.folder.absolute()}
        for name in ("encoder", "aggregator"):
            part = getattr(self, name)
            changed[name] = part and part.model_copy(update={"folder": part.folder.absolute()})
        return self.model_copy(update=changed)

    def check_trusted(self) -> None:
        """Refuse an aggregator whose loading would run code without permission; the encoder has its own check.

        Raises:
            ModelError: the message says how to give permission.
        """
        if self.aggregator.runs_code and not self._trusted:
            raise ModelError(
                f"{shortened(self.aggregator.source, 200)}: loading it runs code that it contains, so it was not "
                "loaded; if you trust its author, allow that with --trust-code (in Python: trust_code=True)"
            )


@dataclass(frozen=True)
class BagExplanation:
    """The explanation of a bag of N patches for T targets.

    Attributes:
        logits: [K], float64.
        attention: `attention`, raw scores, and `attention_weight`, their softmax over the bag, each [N, H]; empty for
            networks without attention.
        relevance: [N, T] by method, in the unit of the slide's logits; NaN if the only patch of a bag would have to be
            removed.
    """

    logits: NDArray[np.float64]
    attention: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    relevance: dict[str, NDArray[np.float64]] = field(default_factory=dict)


MAX_REMOVED = 2000  # patches that are removed one by one from a bag that is seen as a whole


def whole_bag_bytes(growth: Sequence[float], count: int, length: int, targets: int, itemsize: int = 8) -> int:
    """Return the approximate bytes for explaining a whole bag at once: what autograd keeps, features, gradients.

    Args:
        growth: as `BagFacts.whole`.
        count, length: the number of patches, and the length of a feature vector.
    """
    return int(max(float(np.polyval(growth, count)), 0.0)) + count * length * itemsize * (2 + targets)


def refuse_large_bag(count: int, needed: int, methods: Sequence[str], where: str = "") -> None:
    """Refuse a bag that an aggregator sees as a whole and that takes more memory, or time, than is available.

    Args:
        count: the number of its patches.
        needed: bytes of memory.
        methods: those that explain it.
        where: the slide, with which messages begin.

    Raises:
        BagSizeError: the message says how many bytes it takes.
    """
    there = psutil.virtual_memory().available
    if needed > there:
        raise BagSizeError(
            f"{where}a bag of {count:,} patches needs about {needed:,} bytes of memory with this aggregator, but only "
            f"{there:,} are free; aggregators that pool by attention (abmil, clam, dsmil) work in chunks"
        )
    if "one_removed" in methods and count > MAX_REMOVED:
        raise BagSizeError(
            f"{where}one_removed: {count:,} patches would be removed one by one, and this aggregator needs the whole "
            f"bag each time; the limit is {MAX_REMOVED:,}, so use integrated_gradients or lrp"
        )


def is_slide_model(model: str | Path) -> bool:
    """Return whether a file is that of a slide-level model: YAML with an `aggregator:`."""
    path = Path(model)
    if path.suffix not in (".yaml", ".yml"):
        return False
    try:
        return "aggregator" in read_values(path)
    except ModelError:
        return False


def read_slide_model(model: str | Path) -> SlideModelSpec:
    """Return the specification in the file of a slide-level model.

    Raises:
        ModelError: it cannot be read, or has invalid keys or values.
    """
    path = Path(model)
    values = read_values(path)
    if "aggregator" not in values:
        near = did_you_mean("aggregator", [str(key) for key in values])
        asked = near.replace("did you mean", "is it")
        raise ModelError(f"{path}: no 'aggregator:', so this is not a slide-level model{asked and f'; {asked}'}")
    given = {**values, "aggregator": _aggregator(values["aggregator"], path)}
    if values.get("encoder") is not None:
        given["encoder"] = _encoder(values["encoder"], path)
    try:
        return SlideModelSpec.model_validate({"name": path.stem, **given, "folder": path.parent})
    except ValidationError as error:
        raise ModelError(f"{path}: {_explained(error, SlideModelSpec)}") from error


def slide_model_in(values: Mapping[str, Any]) -> SlideModelSpec:
    """Return the specification in the values that a run has stored, with the `folder` of its file.

    Raises:
        ValidationError: they are not those of such a model.
    """
    folder = values["folder"]
    parts = {name: {**values[name], "folder": folder} for name in ("encoder", "aggregator") if values.get(name)}
    return SlideModelSpec.model_validate({**values, **parts})


def with_patch_px(spec: ModelSpec | SlideModelSpec, patch_px: tuple[int, int]) -> ModelSpec | SlideModelSpec:
    """Return a specification whose patches, or those of its encoder, have a different size."""
    if isinstance(spec, ModelSpec):
        return spec.model_copy(update={"patch_px": patch_px})
    encoder = spec.encoder and spec.encoder.model_copy(update={"patch_px": patch_px})
    return spec.model_copy(update={"encoder": encoder})


def _aggregator(values: object, path: Path) -> AggregatorSpec:
    values = {"source": values} if isinstance(values, str) else values
    if not isinstance(values, dict) or "folder" in values:
        raise ModelError(
            f"{path}: aggregator: expected keys such as 'source: abmil' and 'weights: abmil.pt', "
            f"given: {quoted(values)}"
        )
    try:
        return AggregatorSpec.model_validate({**values, "folder": path.parent})
    except ValidationError as error:
        raise ModelError(f"{path}: aggregator: {_explained(error, AggregatorSpec)}") from error


def _encoder(values: object, path: Path) -> ModelSpec:
    """Return the encoder: keys of a patch model, a source, or the path of a patch model's file."""
    if isinstance(values, str) and Path(values).suffix in (".yaml", ".yml"):
        return read_spec(str(path.parent / values))
    values = {"source": values} if isinstance(values, str) else values
    if not isinstance(values, dict) or "folder" in values:
        raise ModelError(
            f"{path}: encoder: expected keys such as 'source: timm:resnet50', or the path of a patch model's file, "
            f"given: {quoted(values)}"
        )
    return spec_in({"name": f"{path.stem} encoder", **values}, path, "encoder")


def _explained(error: ValidationError, of: type[BaseModel]) -> str:
    return explain_validation(error, set(of.model_fields) - {"folder"})


def slide_probabilities(logits: NDArray[np.floating], activation: SlideActivation) -> NDArray[np.float64]:
    """Return slide logits [..., K] as probabilities of the same shape.

    For discrete-time survival (`hazard`), the logit of interval k is that of the hazard h_k, and the result is the
    probability of surviving it, S_k = prod_{j <= k} (1 - h_j).

    >>> slide_probabilities(np.array([0.0, 0.0]), "hazard").tolist()
    [0.5, 0.25]
    >>> slide_probabilities(np.array([[1000.0, 0.0]]), "softmax").tolist()
    [[1.0, 0.0]]
    """
    values = np.array(logits, np.float64)
    if activation == "hazard":
        survived: NDArray[np.float64] = (0.5 * (1 - np.tanh(values / 2))).cumprod(axis=-1)
        return survived
    if activation == "sigmoid":
        risen: NDArray[np.float64] = 0.5 * (1 + np.tanh(values / 2))
        return risen
    if activation == "none":
        return values
    shifted = np.exp(values - values.max(axis=-1, keepdims=True))
    shares: NDArray[np.float64] = shifted / shifted.sum(axis=-1, keepdims=True)
    return shares


def encoder_of(spec: SlideModelSpec) -> ModelSpec:
    """Return the specification of the encoder, see `ModelSpec.as_encoder`.

    Raises:
        ModelError: the model has none: its features come from elsewhere.
    """
    if spec.encoder is None:
        raise ModelError(f"{spec.name}: has no 'encoder:', so it cannot read pixels; add one to the model file")
    return spec.encoder.as_encoder()
