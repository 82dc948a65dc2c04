"""`ModelSpec`: everything that must be known about a model besides its weights, as a YAML file. Needs no torch."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from wsi_gradcam.errors import DocumentError, ModelError, did_you_mean, one_line, quoted, shortened
from wsi_gradcam.io.documents import MAX_BYTES, open_zip, read_yaml
from wsi_gradcam.io.local import check_regular, read_file
from wsi_gradcam.models.staining import StainSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


ZOO = Path(__file__).parent / "zoo"
RANDOM = "random"

Mean = Annotated[float, Field(ge=0)]
Deviation = Annotated[float, Field(gt=0)]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
# Length of a side that is read or resized: a batch of such patches is a few GiB, which is refused before it is made.
MAX_SIDE_PX = 8192
MAX_CLASSES = 100_000
MAX_FINDINGS = 8  # in a message
Side = Annotated[int, Field(gt=0, le=MAX_SIDE_PX)]
Size = tuple[Side, Side]
Word = Annotated[str, Field(max_length=1000)]

# The functions that come with the package, the only ones that are called without permission.
BUNDLED = frozenset({"wsi_gradcam.models.zoo.nets:ihc_dab", "wsi_gradcam.models.zoo.nets:oral_tumour"})
# Sources that are files or folders and contain their weights.
FILES = ("torchscript", "export", "wsinfer", "hf")
# Sources whose loading or running executes what is written in them: TorchScript and exported programs are programs, and
# `torch.export.load` evaluates text in the file.
RUNS_CODE = ("torchscript", "export", "wsinfer", "function")
SCRIPT_SUFFIXES = (".pt", ".pth", ".ts", ".torchscript")
FORMS = (
    "a model file (.yaml), timm:NAME, torchvision:NAME, torchscript:FILE (.pt, .pth, .ts, .torchscript), export:FILE "
    "(.pt2), wsinfer:FOLDER (config.json and torchscript_model.pt), hf:FOLDER (config.json and *.safetensors), "
    "module:function"
)


class Resizing(BaseModel):
    """The change of a patch's size before the network sees it: resized, then cropped.

    Attributes:
        resize: new length of the shorter side, or new (height, width).
        crop: side or (height, width) of the central part that is kept.
        interpolation: interpolation used for resizing, by Pillow.
        crop_rounds: whether a crop half a pixel off the middle goes to the even pixel, as in torchvision, or else down.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize: Side | Size | None = None
    crop: Side | Size | None = None
    interpolation: Interpolation = "bilinear"
    crop_rounds: ClassVar[bool] = True


class ResizingDown(Resizing):
    """The same, except that crops half a pixel off the middle go down, as in Hugging Face's processors."""

    crop_rounds: ClassVar[bool] = False


class ModelSpec(BaseModel):
    """A model file. Keys that are left out are taken from the source if it states them, or else refused on use.

    Attributes:
        name: how results name the model.
        source: `timm:NAME`, `torchvision:NAME`, `torchscript:FILE`, `export:FILE.pt2`, `wsinfer:FOLDER`, `hf:FOLDER` or
            `module:function`, a function without arguments that returns a `torch.nn.Module`. Files are beside the model
            file. If `runs_code` is true, loading needs permission, see `trusting`.
        weights: safetensors or a state dict in .pt/.pth, beside the model file; "random" for untrained weights;
            left out, the source's own (published) weights.
        sha256: of the weights file, else of the one file of a source that is a file, else of a function's code;
            checked when given, before anything is loaded.
        classes: names of the outputs, in their order.
        patch_px: (height, width) of the patch that is read from the slide; also the network's input, unless it is
            resized.
        mpp: micrometres per pixel of the patch.
        scale: white as the network expects it before `mean`: 1, or 255 for colours of 0..255. Colours with a scale,
            but without mean and std, are not normalised.
        mean, std: of RGB in 0..scale, subtracted and divided by.
        stain: how patches are normalised before anything else, see `StainSpec`; None: not at all.
        transform: how a patch is resized and cropped to the network's input.
        output: which of several outputs are the logits: a key, or a position in a tuple; detected if left out.
        layer: name of the module whose output is explained; detected if left out.
        activation: how logits become probabilities.
        license, provenance: kept with the results.
        folder: where relative paths start; not part of the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    name: Annotated[str, Field(min_length=1, max_length=1000)]
    source: Annotated[str, Field(min_length=3, max_length=5000)]
    weights: Annotated[str, Field(max_length=5000)] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    classes: Annotated[tuple[Word, ...], Field(max_length=MAX_CLASSES)] | None = None
    patch_px: Size | None = None
    mpp: PositiveFloat | None = None
    scale: PositiveFloat | None = None
    mean: tuple[Mean, Mean, Mean] | None = None
    std: tuple[Deviation, Deviation, Deviation] | None = None
    stain: StainSpec | None = None
    transform: Resizing | None = None
    output: Word | int | None = None
    layer: Word | None = None
    activation: Activation = "softmax"
    license: str | None = None
    provenance: Any = None
    folder: Path = Field(default=Path(), exclude=True)
    _trusted: bool = PrivateAttr(default=False)  # for this process and its workers: no file can set or store it
    _is_encoder: bool = PrivateAttr(default=False)

    @field_validator("patch_px", mode="before")
    @classmethod
    def _square(cls, value: object) -> object:
        return (value, value) if isinstance(value, int) else value

    @field_validator("stain", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        return {"method": value} if isinstance(value, str) else value

    @field_validator("stain")
    @classmethod
    def _some(cls, value: StainSpec | None) -> StainSpec | None:
        return None if value is not None and value.method == "none" else value

    @field_validator("classes", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        if not isinstance(value, list | tuple):
            return value
        if wrong := [v for v in value if isinstance(v, bool) or not isinstance(v, str | int | float)]:
            given = quoted(wrong[0])
            raise ValueError(f"{given} is not a name; YAML reads yes, no, on and off as true and false, so quote them")
        return [str(v) for v in value]

    @field_validator("classes")
    @classmethod
    def _unique(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and (len(set(value)) != len(value) or not value):
            raise ValueError("class names must be given, each one different")
        return value

    @model_validator(mode="after")
    def _colours(self) -> ModelSpec:
        """Refuse colours of 0..255 taken for 0..1, which would silently whiten every patch."""
        scale = self.scale or 1
        if max(*(self.mean or (0,)), *(self.std or (0,)), 0) > scale:
            raise ValueError(
                f"mean and std should be less than or equal to {scale:g}, since they are of colours in 0..{scale:g}; "
                "for a network that takes colours of 0..255 add 'scale: 255', otherwise divide them by 255"
            )
        return self

    @property
    def kind(self) -> str:
        """The part of `source` before the colon if that is a known kind, else `function`; `model_of` makes `live`."""
        kind = self.source.partition(":")[0]
        return kind if kind in ("timm", "torchvision", "live", *FILES) else "function"

    @property
    def argument(self) -> str:
        """The part of `source` after the kind; all of it for a function."""
        return self.source if self.kind == "function" else self.source.partition(":")[2]

    @property
    def runs_code(self) -> bool:
        """True if loading the model runs code that it contains: use only models from people you trust."""
        return self.kind in RUNS_CODE and self.source not in BUNDLED

    @property
    def trusted(self) -> bool:
        """True if the code that it contains may run, see `trusting`."""
        return self._trusted

    def trusting(self, trust_code: bool = True) -> ModelSpec:
        """Return the specification with permission to run the code in the model, if that is given.

        Only the caller can give permission: a model file or `run.yaml` cannot, and it is never stored.
        """
        if not trust_code or self._trusted:
            return self
        trusted = self.model_copy()
        trusted._trusted = True
        return trusted

    @property
    def is_encoder(self) -> bool:
        """True if the outputs are features: the head of a timm or torchvision network is then removed."""
        return self._is_encoder

    def as_encoder(self) -> ModelSpec:
        """Return the specification of the same network with its features as outputs."""
        encoder = self.model_copy(update={"activation": "none", "classes": None})
        encoder._is_encoder = True
        return encoder

    def check_trusted(self) -> None:
        """Refuse a model whose loading would run code without permission.

        Raises:
            ModelError: the message says how to give permission.
        """
        if self.runs_code and not self._trusted:
            raise ModelError(
                f"{shortened(self.source, 200)}: loading it runs code that it contains, so it was not loaded; if you "
                "trust its author, allow that with --trust-code (in Python: trust_code=True)"
            )

    @property
    def source_path(self) -> Path | None:
        """The file or folder of the source, if it is one."""
        return self.folder / Path(self.argument).expanduser() if self.kind in FILES else None

    @property
    def weights_path(self) -> Path | None:
        """Path of the weights file; None if there is none."""
        return None if self.weights in (None, RANDOM) else self.folder / str(self.weights)


def read_spec(model: str) -> ModelSpec:
    """Return the specification that `--model` names: a YAML file, a bundled model, or a source.

    Raises:
        ModelError: there is no such model, or the file is not a model file.
    """
    path = Path(model)
    if path.suffix in (".yaml", ".yml"):
        return _from_file(path)
    if (ZOO / f"{model}.yaml").is_file():
        return _from_file(ZOO / f"{model}.yaml")
    if model and (kind := _kind_of(path, model)) is not None:
        name = path.stem if path.is_file() else path.resolve().name
        return _validated({"name": name or model, "source": f"{kind}:{model}"}, Path(), model)
    if ":" in model:
        return _validated({"name": model, "source": model}, Path(), model)
    if near := did_you_mean(model, bundled()):
        raise ModelError(f"{model}: no such model; {near}")
    raise ModelError(f"{model}: no such model; expected {FORMS}, or a bundled one: {', '.join(bundled())}")


def _kind_of(path: Path, given: str) -> str | None:
    """Return the kind of source that a file or folder is; None if there is none.

    Raises:
        ModelError: it exists, but cannot be used.
    """
    try:
        there, folder = path.exists(), path.is_dir()
    except (OSError, ValueError):  # not a path at all: the name is too long, or has a zero byte
        return None
    if there and path.suffix == ".pt2":
        return "export"
    if there and not folder and path.suffix in SCRIPT_SUFFIXES:
        regular(path, given)
        if is_torchscript(path):
            return "torchscript"
        raise ModelError(
            f"{given}: is not a TorchScript program; weights alone need a model file (.yaml) that names their network: "
            f"'source: timm:resnet18' (or another) and 'weights: {path.name}'"
        )
    return _kind_of_folder(path, given) if folder else None


def _kind_beside(file: Path, source: str) -> str | None:
    """Return the kind of a source that is a path relative to a model file, as for `--model`; None if it is not a path.

    Raises:
        ModelError: such a file is missing, or cannot be used.
    """
    path = file.parent / Path(source).expanduser()
    found = _kind_of(path, str(path)) if source else None
    if found is None and ":" not in source and path.suffix in (*SCRIPT_SUFFIXES, ".pt2"):
        raise ModelError(f"{file}: source: no file {path}; paths are relative to the model file")
    return found


def regular(path: Path, given: str) -> Path:
    """Return the path of a regular file.

    Raises:
        ModelError: it is missing, a folder, or a pipe or device, which might block or never end.
    """
    try:
        check_regular(path)
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(f"{shortened(given, 200)}: {shortened(str(path), 300)} cannot be read: {cause}") from error
    return path


def _kind_of_folder(path: Path, given: str) -> str:
    if (path / "torchscript_model.pt").exists():
        return "wsinfer"
    if not (path / "config.json").exists():
        raise ModelError(f"{given}: the folder has no config.json, so it is not a model; expected {FORMS}")
    if any(path.glob("*.safetensors")):
        return "hf"
    raise ModelError(
        f"{given}: neither torchscript_model.pt (WSInfer) nor *.safetensors (Hugging Face) lies beside config.json; "
        "weights in pickles (.bin, .pt, .pth) are not loaded: save them with save_pretrained or "
        "safetensors.torch.save_file"
    )


def is_torchscript(path: Path) -> bool:
    """Return whether a file is a TorchScript archive; state dicts and pickled models have the same file endings."""
    try:
        check_regular(path)
        with open_zip(path) as archive:
            return any(name.split("/")[-1] == "constants.pkl" for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return False


def bundled() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(path.stem for path in ZOO.glob("*.yaml"))


def _from_file(path: Path) -> ModelSpec:
    return spec_in(read_values(path), path)


def read_values(path: Path) -> dict[str, Any]:
    """Return the keys and values of a model file, within the limits for untrusted documents.

    Raises:
        ModelError: it cannot be read, or has no keys and values.
    """
    try:
        values = read_yaml(read_file(path, MAX_BYTES))
    except DocumentError as error:
        raise ModelError(f"{path}: not a YAML file that can be read: {one_line(error)}") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected keys and values such as 'source: timm:resnet18'")
    if "folder" in values:
        raise ModelError(f"{path}: folder: unknown key, check the spelling")  # ours, not the file's
    return values


def spec_in(values: dict[str, Any], path: Path, within: str = "") -> ModelSpec:
    """Return the specification given by the values of a model file, or by those `within` a part of it.

    Raises:
        ModelError: they are not valid.
    """
    source = values.get("source")
    if isinstance(source, str) and (kind := _kind_beside(path, source)) is not None:
        values = {**values, "source": f"{kind}:{source}"}
    return _validated({"name": path.stem, **values}, path.parent, f"{path}: {within}" if within else str(path))


def _validated(values: dict[str, Any], folder: Path, origin: str) -> ModelSpec:
    try:
        return ModelSpec.model_validate({**values, "folder": folder})
    except ValidationError as error:
        raise ModelError(f"{origin}: {explain_validation(error, set(ModelSpec.model_fields) - {'folder'})}") from error


def explain_validation(error: ValidationError, keys: Iterable[str] = ()) -> str:
    """Return Pydantic's findings on one line: key, problem, given value; the first few if there are many.

    `keys` are suggested in place of an unknown one.
    """
    found = error.errors(include_url=False)
    more = [f"and {len(found) - MAX_FINDINGS} more"] if len(found) > MAX_FINDINGS else []
    return "; ".join([*(_finding(each, keys) for each in found[:MAX_FINDINGS]), *more])


def _finding(error: ErrorDetails, keys: Iterable[str]) -> str:
    message = shortened(error["msg"].removeprefix("Value error, ").removeprefix("Input "), 300)
    if not error["loc"]:  # for several keys together: the message names them
        return message
    key = shortened(".".join(str(part) for part in error["loc"]), 100)
    if error["type"] == "missing":
        return f"{key}: {message}"
    near = did_you_mean(key, keys) if len(error["loc"]) == 1 else ""
    unknown = f"unknown key, check the spelling{near and f': {near}'}"
    known = unknown if error["type"] == "extra_forbidden" else message
    return f"{key}: {known} (given: {quoted(error['input'])})"


Activation = Literal["softmax", "sigmoid", "none"]


def probabilities(logits: NDArray[np.float32], activation: Activation | Literal["hazard"]) -> NDArray[np.float32]:
    """Return probabilities from logits, float32 [n, classes], by softmax, sigmoid or no activation; same shape.

    Hazards, of successive time intervals, become the probabilities of surviving each interval.

    >>> probabilities(np.array([[0, 0], [1000, 0]], np.float32), "softmax").tolist()
    [[0.5, 0.5], [1.0, 0.0]]
    """
    if activation == "none":
        return logits
    if activation == "hazard":
        return np.cumprod(0.5 * (1 - np.tanh(logits / 2)), axis=1, dtype=np.float32)
    if activation == "sigmoid":
        return (0.5 * (1 + np.tanh(logits / 2))).astype(np.float32)  # does not overflow
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float32] = shifted / shifted.sum(axis=1, keepdims=True)
    return shares
