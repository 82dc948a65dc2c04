"""`wsinfer:FOLDER`: models of the WSInfer zoo, `config.json` beside `torchscript_model.pt`.

The configuration is that of https://github.com/SBU-BMI/wsinfer-zoo, `model-config.schema.json`. As WSInfer does, its
transforms are torchvision's on PIL images, and logits become probabilities by softmax, a single one by sigmoid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from wsi_gradcam.errors import DocumentError, ModelError, one_line, quoted
from wsi_gradcam.io.documents import MAX_BYTES, read_json
from wsi_gradcam.io.local import read_file
from wsi_gradcam.models.sources import Built
from wsi_gradcam.models.sources.programs import load_torchscript
from wsi_gradcam.models.spec import Interpolation, ModelSpec, Resizing, explain_validation

if TYPE_CHECKING:
    from pathlib import Path

CONFIG, PROGRAM = "config.json", "torchscript_model.pt"
# torchvision also takes the integers of Pillow.
INTERPOLATIONS: dict[object, Interpolation] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
    **{name: name for name in ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")},
}
KNOWN = {
    "Resize": {"size", "interpolation", "antialias", "max_size"},
    "ToTensor": set[str](),
    "Normalize": {"mean", "std", "inplace"},
}
Triple = tuple[float, float, float]


class Step(BaseModel):
    """A transform by the name of its class in torchvision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["Resize", "ToTensor", "Normalize"]
    arguments: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _arguments(self) -> Step:
        if unknown := sorted(set(self.arguments or {}) - KNOWN[self.name]):
            raise ValueError(f"{self.name} has no argument {unknown[0]!r}; known: {sorted(KNOWN[self.name])}")
        return self


class Config(BaseModel):
    """A model's configuration. Unknown keys are tolerated: the zoo adds some.

    Attributes:
        patch_size_pixels: what is read from the slide, at `spacing_um_px` micrometres per pixel.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    num_classes: PositiveInt
    class_names: tuple[str, ...]
    patch_size_pixels: PositiveInt
    spacing_um_px: PositiveFloat
    transform: tuple[Step, ...]
    license: Annotated[str | None, Field(strict=True)] = None

    @model_validator(mode="after")
    def _agree(self) -> Config:
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, but there are {len(self.class_names)} class_names")
        if len(set(self.class_names)) != self.num_classes:
            raise ValueError("class_names should differ from each other")
        order = [step.name for step in self.transform]
        if order not in [[*resize, "ToTensor", *norm] for resize in ([], ["Resize"]) for norm in ([], ["Normalize"])]:
            raise ValueError(
                f"transform: the steps {', '.join(order) or '(none)'} are not supported; expected Resize (optional), "
                "ToTensor, Normalize (optional), in this order"
            )
        return self

    def arguments(self, name: str) -> dict[str, Any]:
        """Return the arguments of the step of that name; empty if there is none."""
        return next((step.arguments or {} for step in self.transform if step.name == name), {})


def build_wsinfer(spec: ModelSpec) -> Built:
    """Build the model in a folder, with all that its configuration says.

    Raises:
        ModelError: a file is missing or cannot be used.
    """
    folder = spec.source_path
    assert folder is not None
    config = read_config(folder / CONFIG, spec.source)
    resizing = _resizing(config, spec)
    normalise = config.arguments("Normalize")
    side = config.patch_size_pixels
    module, digest = load_torchscript(folder / PROGRAM, spec, spec.patch_px or (side, side), resizing)
    return Built(
        module,
        classes=config.class_names,
        patch_px=(side, side),
        mpp=config.spacing_um_px,
        mean=_triple(spec, normalise.get("mean", (0.0, 0.0, 0.0)), "mean"),
        std=_triple(spec, normalise.get("std", (1.0, 1.0, 1.0)), "std"),
        scale=1.0,
        resizing=resizing,
        activation="softmax" if config.num_classes > 1 else "sigmoid",
        license=config.license,
        code_digest=digest,
    )


def read_config(path: Path, source: str) -> Config:
    """Read the configuration in a file.

    Raises:
        ModelError: it is missing, or not as WSInfer's schema wants it.
    """
    try:
        return Config.model_validate(read_json(read_file(path, MAX_BYTES)))
    except OSError as error:
        raise ModelError(f"{source}: {path} cannot be read: {error.strerror}; a WSInfer model needs it") from error
    except ValidationError as error:
        raise ModelError(f"{path}: not a configuration of WSInfer: {explain_validation(error)}") from error
    except DocumentError as error:
        raise ModelError(f"{path}: not a JSON file that is read here: {one_line(error)}") from error


def _resizing(config: Config, spec: ModelSpec) -> Resizing | None:
    arguments = config.arguments("Resize")
    if not arguments:
        return None
    given = arguments.get("interpolation", "bilinear")
    if not isinstance(given, str | int) or given not in INTERPOLATIONS or arguments.get("max_size") is not None:
        raise ModelError(f"{spec.source}: the arguments of Resize are not supported: {quoted(arguments)}")
    size = arguments.get("size")
    if isinstance(size, list) and len(size) == 1:
        size = size[0]
    try:
        return Resizing(resize=size, interpolation=INTERPOLATIONS[given])
    except ValidationError as error:
        raise ModelError(f"{spec.source}: the size of Resize: {explain_validation(error)}") from error


def _triple(spec: ModelSpec, values: Any, name: str) -> Triple:
    numbers = isinstance(values, list | tuple) and all(isinstance(v, int | float) for v in values)
    if not numbers or len(values) not in (1, 3) or (name == "std" and min(values) <= 0):
        given = quoted(values)
        raise ModelError(f"{spec.source}: {name} of Normalize should be three numbers for RGB (given: {given})")
    red, green, blue = (values * 3)[:3]
    return (float(red), float(green), float(blue))
