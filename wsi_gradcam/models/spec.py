"""`ModelSpec`: what the pipeline must know of a model besides its weights, as a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)
from pydantic_core import ErrorDetails

from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.activation import Activation

ZOO = Path(__file__).parent / "zoo"
RANDOM = "random"

# In 0..1: values of 0..255 are a mistake that would silently whiten every patch.
Mean = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(gt=0, le=1)]


class ModelSpec(BaseModel):
    """A model file. What is left out is taken from the source where it knows better, else refused when needed.

    Attributes:
        name: how results name the model.
        source: `timm:NAME`, `torchvision:NAME` or `module:function`, a function without arguments that returns
            a `torch.nn.Module`. The last one runs code: use only what you trust.
        weights: safetensors or a state dict in .pt/.pth, beside the model file; "random" for untrained weights;
            left out, the source's own (published) weights.
        sha256: of the weights file; checked when given.
        classes: names of the outputs, in their order.
        patch_px: (height, width) of the input.
        mpp: micrometres per pixel of the input.
        mean, std: of RGB in 0..1, subtracted and divided by.
        layer: name of the module whose output is explained; found when left out.
        activation: how logits become probabilities.
        license, provenance: kept with the results.
        folder: where relative paths start; not part of the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    name: str = Field(min_length=1)
    source: str = Field(min_length=3)
    weights: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    classes: tuple[str, ...] | None = None
    patch_px: tuple[PositiveInt, PositiveInt] | None = None
    mpp: PositiveFloat | None = None
    mean: tuple[Mean, Mean, Mean] | None = None
    std: tuple[Deviation, Deviation, Deviation] | None = None
    layer: str | None = None
    activation: Activation = "softmax"
    license: str | None = None
    provenance: Any = None
    folder: Path = Field(default=Path(), exclude=True)

    @field_validator("patch_px", mode="before")
    @classmethod
    def _square(cls, value: object) -> object:
        return (value, value) if isinstance(value, int) else value

    @field_validator("classes", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        if not isinstance(value, list | tuple):
            return value
        if wrong := [v for v in value if isinstance(v, bool) or not isinstance(v, str | int | float)]:
            raise ValueError(f"{wrong[0]} is no name; YAML reads yes, no, on and off as true and false: quote them")
        return [str(v) for v in value]

    @field_validator("classes")
    @classmethod
    def _unique(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and (len(set(value)) != len(value) or not value):
            raise ValueError("class names must be given and differ from each other")
        return value

    @property
    def weights_path(self) -> Path | None:
        """Where the weights file is; None when there is none."""
        return None if self.weights in (None, RANDOM) else self.folder / str(self.weights)


def read_spec(model: str) -> ModelSpec:
    """The specification that `--model` names: a YAML file, a model that comes with the package, or a source.

    Raises:
        ModelError: nothing of that name, or a file that is not a model file.
    """
    path = Path(model)
    if path.suffix in (".yaml", ".yml"):
        return _from_file(path)
    if (ZOO / f"{model}.yaml").is_file():
        return _from_file(ZOO / f"{model}.yaml")
    if ":" in model:
        return _validated({"name": model, "source": model}, Path(), model)
    raise ModelError(
        f"{model}: no such model; expected a model file (.yaml), timm:NAME, torchvision:NAME, module:function, "
        f"or one that comes with wsi_gradcam: {', '.join(bundled())}"
    )


def bundled() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.stem for path in ZOO.glob("*.yaml"))


def _from_file(path: Path) -> ModelSpec:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected keys and values such as 'source: timm:resnet18'")
    if "folder" in values:
        raise ModelError(f"{path}: folder: unknown key, check the spelling")  # ours, not the file's
    return _validated({"name": path.stem, **values}, path.parent, str(path))


def _validated(values: dict[str, Any], folder: Path, origin: str) -> ModelSpec:
    try:
        return ModelSpec.model_validate({**values, "folder": folder})
    except ValidationError as error:
        raise ModelError(f"{origin}: {explain_validation(error)}") from error


def explain_validation(error: ValidationError) -> str:
    """Pydantic's findings on one line: key, what is wrong, what was given."""
    return "; ".join(_finding(e) for e in error.errors())


def _finding(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # of several keys together: the message names them
        return message
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{key}: {message}"
    known = "unknown key, check the spelling" if error["type"] == "extra_forbidden" else message
    return f"{key}: {known} (given: {error['input']!r})"
