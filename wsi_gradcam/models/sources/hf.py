"""`hf:FOLDER`: folders as on the Hugging Face hub, of timm or transformers: config.json and weights in safetensors.

Nothing is fetched, no code in the folder is run and no pickle is read.

Patches are read from the slide at the size of the network's input and go in as they are. The declared resize and
centre crop are for photographs of any size: of a patch larger by the cropped margin they would keep just these pixels.
With another `patch_px` they are carried out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from wsi_gradcam.errors import ModelError, one_line
from wsi_gradcam.models.sources import Built, hf_transformers
from wsi_gradcam.models.sources.folders import check_sha256, distinct, read_json
from wsi_gradcam.models.spec import ModelSpec, Resizing

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

Size = tuple[int, int]


def build(argument: str, spec: ModelSpec) -> Built:
    """The model in a folder.

    Raises:
        ModelError: a file is missing or cannot be used.
    """
    folder = spec.source_path
    assert folder is not None
    if spec.weights is not None:
        raise ModelError(f"{spec.source}: the weights are in the folder; leave out 'weights: {spec.weights}'")
    config = read_json(folder / "config.json", spec.source)
    if not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"{spec.source}: no *.safetensors in {folder}; weights in pickles (.bin, .pt) are not loaded: save them "
            "with save_pretrained or safetensors.torch.save_file"
        )
    if "architecture" in config:
        return _timm(folder, config, spec)
    if "model_type" in config:
        return hf_transformers.build(folder, config, spec)
    raise ModelError(
        f"{spec.source}: config.json names neither a timm 'architecture' nor a transformers 'model_type'; it is no "
        "image classifier"
    )


def _timm(folder: Path, config: dict[str, Any], spec: ModelSpec) -> Built:
    import timm

    cfg = config.get("pretrained_cfg", config)
    arguments = {**config.get("model_args", {}), "num_classes": config.get("num_classes", cfg.get("num_classes"))}
    name = str(config["architecture"])
    if not timm.is_model(name.split(".")[0]):
        raise ModelError(f"{spec.source}: this timm has no architecture {name!r}; update timm, or check config.json")
    try:
        module = timm.create_model(name, pretrained=False, **{k: v for k, v in arguments.items() if v is not None})
        module.load_state_dict(_weights(folder, spec))
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
    )


def _weights(folder: Path, spec: ModelSpec) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    path = folder / "model.safetensors"
    if path not in files:
        if len(files) > 1:
            raise ModelError(f"{spec.source}: several *.safetensors and none called model.safetensors: keep one")
        path = files[0]
    check_sha256(path, spec)
    return load_file(path)


def _timm_resizing(cfg: dict[str, Any], input_px: Size, spec: ModelSpec) -> Resizing | None:
    """As timm's `create_transform` for evaluation: the shorter side to size / crop_pct, then the centre."""
    if spec.patch_px in (None, input_px) or spec.transform is not None:
        return None
    crop_pct, mode = cfg.get("crop_pct") or 0.875, cfg.get("crop_mode") or "center"
    interpolation = cfg.get("interpolation") or "bicubic"
    if mode not in ("center", "squash") or (mode == "center" and input_px[0] != input_px[1]):
        raise ModelError(
            f"{spec.source}: patch_px {spec.patch_px} is not the input's {input_px}, and crop_mode {mode!r} of such "
            "inputs is not supported; leave out patch_px, or say with 'transform:' what is to be done"
        )
    scaled = (math.floor(input_px[0] / crop_pct), math.floor(input_px[1] / crop_pct))
    return Resizing(
        resize=scaled[0] if mode == "center" else scaled,
        crop=input_px,
        interpolation="bilinear" if interpolation == "random" else interpolation,
    )
