"""`hf:FOLDER`: folders as on the Hugging Face hub, for timm or transformers: config.json and safetensors.

Nothing is downloaded, no code in the folder is run, and no pickle is read.

Patches are read from the slide at the size of the network's input and used as they are. The declared resize and centre
crop are meant for photographs of any size: from a patch larger by the cropped margin, they would keep just these
pixels. With another `patch_px`, they are carried out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wsi_gradcam.errors import DocumentError, ModelError, from_extra, one_line, quoted
from wsi_gradcam.io.documents import MAX_BYTES, read_json
from wsi_gradcam.io.local import read_file
from wsi_gradcam.models.sources import Built, load_weights
from wsi_gradcam.models.spec import ModelSpec, Resizing, ResizingDown, regular
from wsi_gradcam.models.transform import Transform, make_transform
from wsi_gradcam.system.processes import tensors_only

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

    from wsi_gradcam.models.spec import Activation, Interpolation, ModelSpec


def read_mapping(path: Path, source: str) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Raises:
        ModelError: it does not.
    """
    try:
        values = read_json(read_file(path, MAX_BYTES))
    except DocumentError as error:
        raise ModelError(f"{path}: not a JSON file that can be read: {one_line(error)}") from error
    except OSError as error:
        raise ModelError(f"{source}: {path} cannot be read: {error.strerror}; the folder needs it") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected a mapping of keys to values")
    return values


def distinct(names: Iterable[object]) -> tuple[str, ...]:
    """Return distinct class names: repeated ones get their index, as ImageNet's two called `crane`.

    >>> distinct(["crane", "mouse", "crane"])
    ('crane (0)', 'mouse', 'crane (2)')
    """
    texts = [str(name) for name in names]
    counts = Counter(texts)
    return tuple(text if counts[text] == 1 else f"{text} ({i})" for i, text in enumerate(texts))


Size = tuple[int, int]


def build_hf(spec: ModelSpec) -> Built:
    """Build the model in a folder.

    Raises:
        ModelError: a file is missing or cannot be used.
    """
    folder = spec.source_path
    assert folder is not None
    if spec.weights is not None:
        raise ModelError(f"{spec.source}: the weights are in the folder; leave out 'weights: {spec.weights}'")
    config = read_mapping(folder / "config.json", spec.source)
    for path in [*folder.glob("*.json"), *folder.glob("*.safetensors")]:  # what libraries may open
        regular(path, spec.source)
    if not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"{spec.source}: no *.safetensors in {folder}; weights in pickles (.bin, .pt) are not loaded: save them "
            "with save_pretrained or safetensors.torch.save_file"
        )
    _check_bounds(folder, config, spec)
    build = _build_timm if "architecture" in config else _build_transformers if "model_type" in config else None
    if build is not None:
        try:
            return build(folder, config, spec)
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{spec.source}: its configuration cannot be used: {one_line(error)}") from error
    raise ModelError(
        f"{spec.source}: config.json names neither a timm 'architecture' nor a transformers 'model_type'; it is not an "
        "image classifier"
    )


MAX_HEADER = 16 << 20  # bytes that name the tensors of a file; a network of 10,000 takes one MiB
MAX_LAYERS = 1000
LAYERS = re.compile(r"(^|_)(layers?|depths?|blocks?|repeats?)$")  # keys whose numbers are numbers of layers


def _check_bounds(folder: Path, config: dict[str, Any], spec: ModelSpec) -> None:
    """Refuse anything that would take long to build or read.

    Raises:
        ModelError: there are more layers, or a longer list of tensors, than networks have.
    """
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if MAX_HEADER < size <= path.stat().st_size:  # the library refuses anything longer than its file
            raise ModelError(f"{spec.source}: {path.name}: a header of {size:,} bytes, expected at most {MAX_HEADER:,}")
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += [(str(key), each) for key, each in value.items()] if isinstance(value, dict) else []
            waiting += [(name, each) for each in value] if isinstance(value, list) else []
        elif isinstance(value, int | float) and value > MAX_LAYERS and LAYERS.search(name):
            raise ModelError(f"{spec.source}: its configuration has {name} {value:g}, expected at most {MAX_LAYERS}")


def _check_size(build: Callable[[], torch.nn.Module], folder: Path, spec: ModelSpec) -> None:
    """Refuse a network with more weights than its files have bytes, before it takes memory.

    Raises:
        ModelError: it has.
    """
    try:
        with torch.device("meta"):
            count = sum(weights.numel() for weights in build().parameters())
    except Exception:  # what is wrong is said where it is built in earnest; and some networks need numbers to be built
        return
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if count > held:
        raise ModelError(
            f"{spec.source}: its configuration describes a network of {count:,} weights, but its *.safetensors have "
            f"only {held:,} bytes; copy them again, or the matching config.json"
        )


def _build_timm(folder: Path, config: dict[str, Any], spec: ModelSpec) -> Built:
    with from_extra("timm", spec.source):
        import timm

    cfg = config.get("pretrained_cfg", config)
    arguments = {**config.get("model_args", {}), "num_classes": config.get("num_classes", cfg.get("num_classes"))}
    name = str(config["architecture"])
    if not timm.is_model(name.split(".")[0]):
        raise ModelError(
            f"{spec.source}: the installed timm has no architecture {quoted(name)}; update timm, or check config.json"
        )
    given = {key: value for key, value in arguments.items() if value is not None}
    try:
        _check_size(partial(timm.create_model, name, pretrained=False, **given), folder, spec)
        module = timm.create_model(name, pretrained=False, **given)
        notes = load_weights(module, weights_file(folder, spec), spec)
    except ModelError:
        raise
    except Exception as error:  # arguments of any kind, weights of another network
        raise ModelError(f"{spec.source}: {one_line(error)[:400]}") from error
    size = (cfg.get("input_size") or (3, 224, 224))[1:]
    input_px = (int(size[0]), int(size[1]))
    labels = cfg.get("label_names") or config.get("label_names")
    return Built(
        module,
        classes=distinct(labels) if labels and len(labels) == arguments["num_classes"] else None,
        patch_px=input_px,
        mean=tuple(cfg.get("mean") or (0.485, 0.456, 0.406)),
        std=tuple(cfg.get("std") or (0.229, 0.224, 0.225)),
        scale=1.0,
        resizing=_timm_resizing(cfg, input_px, spec),
        license=cfg.get("license"),
        notes=notes,
    )


def weights_file(folder: Path, spec: ModelSpec) -> Path:
    """Return the only weights file in a folder.

    Raises:
        ModelError: there is none, or several.
    """
    files = sorted(folder.glob("*.safetensors"))
    path = folder / "model.safetensors"
    if path in files:
        return path
    if len(files) != 1:
        raise ModelError(
            f"{spec.source}: {len(files) or 'no'} *.safetensors and none called model.safetensors; keep only one"
        )
    return files[0]


def _timm_resizing(cfg: dict[str, Any], input_px: Size, spec: ModelSpec) -> Resizing | None:
    """Return the resizing of timm's `create_transform`: the shorter side to size / crop_pct, then the centre."""
    if spec.patch_px in (None, input_px) or spec.transform is not None:
        return None
    crop_pct, mode = cfg.get("crop_pct") or 0.875, cfg.get("crop_mode") or "center"
    interpolation = cfg.get("interpolation") or "bicubic"
    if mode not in ("center", "squash") or (mode == "center" and input_px[0] != input_px[1]):
        raise ModelError(
            f"{spec.source}: patch_px {spec.patch_px} is not the input's {input_px}, and crop_mode {mode!r} of such "
            "inputs is not supported; leave out patch_px, or set 'transform:'"
        )
    scaled = (math.floor(input_px[0] / crop_pct), math.floor(input_px[1] / crop_pct))
    return Resizing(
        resize=scaled[0] if mode == "center" else scaled,
        crop=input_px,
        interpolation="bilinear" if interpolation == "random" else interpolation,
    )


Triple = tuple[float, float, float]
INTERPOLATIONS: dict[int, Interpolation] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}
# Transformers would fetch these from elsewhere, or run code other than its own.
REFUSED = {"adapter_config.json": "an adapter", "quantization_config": "quantised weights"}


def _build_transformers(folder: Path, config: dict[str, Any], spec: ModelSpec) -> Built:
    """Build the classifier in a folder, with its classes and its image processor's transform.

    Raises:
        ModelError: it is not a classifier, or transformers is not installed.
    """
    transformers = _import(spec)
    for name, what in REFUSED.items():
        if name in config or (folder / name).exists():
            raise ModelError(
                f"{spec.source}: holds {what} ({name}), which is not supported; save the merged float model"
            )
    files = sorted(folder.glob("*.safetensors"))
    if spec.sha256 is not None and len(files) != 1:
        raise ModelError(f"{spec.source}: sha256 is that of one file, but there are {len(files)} *.safetensors")
    with tensors_only(), _quiet(transformers):
        module = _load(transformers, folder, spec)
        processor = _processor(transformers, folder, spec)
    labels = module.config.id2label or {}
    return Built(
        module,
        classes=distinct(labels[key] for key in sorted(labels, key=int)),
        activation=_activation(module.config.problem_type),
        **_prepared(processor, module.config, spec),
    )


def _import(spec: ModelSpec) -> Any:
    with from_extra("hf", spec.source):
        import transformers

    return transformers


def _load(transformers: Any, folder: Path, spec: ModelSpec) -> Any:
    def untrained() -> Any:
        about = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind = transformers.AutoModelForImageClassification
        return kind.from_config(about, attn_implementation="eager", trust_remote_code=False)

    _check_size(untrained, folder, spec)
    try:
        # Attention with plain operators: the configuration may name kernels that would be downloaded.
        module, report = transformers.AutoModelForImageClassification.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=torch.float32,
            attn_implementation="eager",
        )
    except Exception as error:  # configurations of any kind
        raise ModelError(
            f"{spec.source}: transformers cannot load it as an image classifier: {one_line(error)[:400]}"
        ) from error
    if wrong := [*report["missing_keys"], *report["mismatched_keys"]]:  # transformers would leave them untrained
        names = ", ".join(str(name) for name in sorted(wrong, key=str)[:5])
        raise ModelError(f"{spec.source}: the weights do not fit: {len(wrong)} missing or of another shape: {names}")
    return module


def _processor(transformers: Any, folder: Path, spec: ModelSpec) -> Any:
    if not (folder / "preprocessor_config.json").exists():
        return None
    try:
        return transformers.AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, backend="pil"
        )
    except Exception as error:  # configurations of any kind
        raise ModelError(f"{spec.source}: preprocessor_config.json cannot be used: {one_line(error)[:400]}") from error


def _prepared(processor: Any, config: Any, spec: ModelSpec) -> dict[str, Any]:
    """Return patch size, colours and resizing for `Built`."""
    if processor is None:
        if spec.scale is None and (spec.mean is None or spec.std is None):
            raise ModelError(
                f"{spec.source}: no preprocessor_config.json, so its normalisation is unknown; add that file to the "
                "folder, or give mean and std in a model file"
            )
        return {"patch_px": spec.patch_px or _pair(getattr(config, "image_size", None))}
    colours = _colours(processor)
    declared = _declared(processor)
    input_px = _input_px(declared, config)
    if declared is not None and (declared.resize or declared.crop):
        _check(processor, declared, colours, spec)
    same = spec.patch_px in (None, input_px) or spec.transform is not None
    return {**colours, "patch_px": spec.patch_px or input_px, "resizing": None if same else declared}


def _colours(processor: Any) -> dict[str, Any]:
    factor = float(processor.rescale_factor) if processor.do_rescale else 1.0
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if processor.do_normalize:
        mean, std = _triple(processor.image_mean), _triple(processor.image_std)
    if getattr(processor, "rescale_offset", False):  # EfficientNet: to -1..1 before it is normalised
        mean = (mean[0] + 1, mean[1] + 1, mean[2] + 1)
    if getattr(processor, "include_top", False):  # EfficientNet: divided once more
        std = (std[0] ** 2, std[1] ** 2, std[2] ** 2)
    scale = 255 * factor
    return {"mean": mean, "std": std, "scale": 1.0 if abs(scale - 1) < 1e-9 else scale}


def _declared(processor: Any) -> Resizing:
    """Return the resizing and cropping that the processor does."""
    size = processor.size if processor.do_resize else {}
    resize, crop = _side(size), None
    if getattr(processor, "do_center_crop", False):
        crop = _pair(_side(processor.crop_size))
    percent = getattr(processor, "crop_pct", None)
    if percent is not None and isinstance(resize, int):  # ConvNeXt: large inputs are squeezed, others cropped
        crop = crop or (resize, resize)
        resize = int(resize / percent) if resize < 384 else (resize, resize)
    return ResizingDown(resize=resize, crop=crop, interpolation=INTERPOLATIONS[int(processor.resample or 0)])


def _side(size: Any) -> Any:
    """Return the shorter side, or (height, width), from transformers' ways of giving a size; None for others."""
    given = dict(size or {})
    if given.get("height") and given.get("width"):
        return (given["height"], given["width"])
    return given.get("shortest_edge")


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _input_px(declared: Resizing, config: Any) -> tuple[int, int] | None:
    return _pair(declared.crop or declared.resize or getattr(config, "image_size", None))


def _check(processor: Any, declared: Resizing, colours: dict[str, Any], spec: ModelSpec) -> None:
    """Compare with the processor itself on a noise image: there are dozens of them, each with peculiarities."""
    from PIL import Image

    sides = [s for size in (declared.resize, declared.crop) for s in (_pair(size) or ())]
    side = int(1.2 * max(sides)) + 1
    ours: Transform = make_transform((side, side), **colours, resizing=declared)
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    found = ours(torch.from_numpy(picture)[None])
    expected: Tensor = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    if expected.shape != found.shape or not torch.allclose(found, expected.float(), atol=1e-5, rtol=1e-5):
        raise ModelError(
            f"{spec.source}: its {type(processor).__name__.removesuffix('Pil')} does more than resize, crop and "
            "normalise, which cannot be reproduced; wrap the model in a function that takes plain RGB ('source: "
            "module:function')"
        )


def _triple(values: Any) -> Triple:
    three = [float(values)] * 3 if isinstance(values, int | float) else [float(v) for v in values]
    return (three[0], three[1], three[2])


def _activation(problem: str | None) -> Activation | None:
    return {"multi_label_classification": "sigmoid", "regression": "none"}.get(problem or "")  # type: ignore[return-value]


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence progress bars and reports, which would appear in the middle of our own."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
