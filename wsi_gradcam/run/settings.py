"""Settings of a run: from a YAML file, flags or Python, validated; unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from wsi_gradcam.errors import ConfigError
from wsi_gradcam.models.spec import explain_validation

# What only changes how fast or how patiently a result is reached, not the result.
# Nor where the mask lies, or where a slide's mpp is from: the mask's content and the mpp count, slide by slide.
NOT_IN_IDENTITY = frozenset(
    {"reader_threads", "torch_threads", "max_unreadable", "mask", "mpp", "replace_mpp", "trust_objective"}
)


class Settings(BaseModel):
    """How slides are explained. Every field is a flag of `wsi-gradcam explain` and a key of its --config file.

    Attributes:
        target: classes by name or index, `predicted`, or `all`. Nothing given: all of up to 10, else predicted.
        method: explanations by name, see `wsi_gradcam.cam.names`; several share the forward pass.
        layer: module to explain, or several joined by "+", whose maps are averaged; nothing given: the model
            file's, else found.
        mpp: micrometres per level-0 pixel of slides that do not tell theirs: one value, or (y, x); a list's own value
            goes first.
        replace_mpp: use `mpp`, and that of a list, also for slides that tell another.
        patch_mpp: replaces the model's micrometres per input pixel.
        patch_px: replaces the model's input size: one value, or (height, width).
        overlap: share of a patch that its neighbour covers too, along each axis.
        stride_px: instead of `overlap`: patch pixels from one patch to the next.
        min_tissue: patches with a smaller share of tissue are left out.
        tissue: what counts as tissue: "auto", what differs from glass and is neither ink nor shadow; "with-pen", ink
            too, for stains that look like it (trichrome, Alcian blue); "everything", all of the slide.
        mask: which part is explained: a file that covers the slide (PNG, not black is in; GeoJSON; XML of ASAP or
            ImageScope), or a folder with one for each slide. Of what is in, `tissue` is explained.
        include: names of the annotation classes of `mask` that are in; nothing given: all but those excluded.
        exclude: names of the annotation classes of `mask` that are out, also where they lie on others.
        heatmap_stride: level-0 pixels per heatmap pixel, a power of two.
        window: how overlapping patches are weighed, `hann` or `uniform`.
        batch_size: patches per forward pass; "auto": as many as bring speed and fit into memory.
        span_patches: patches per unit of work, a multiple of `batch_size`.
        device: where the model runs, as torch names it.
        engine: what runs the network up to the layer: eager, compile, openvino; "auto": the fastest, see `precision`.
        precision: of the network up to the layer: float32, bfloat16, float16; "auto": the fastest that keeps the
            maps, which is found out on the first patches of a run and kept for all of it.
        reader: what opens slides: openslide, tiff, ome-zarr, picture; "auto": the fastest that shows a file rightly.
        trust_objective: take the mpp of slides that do not tell it from the objective's power (40x: 0.25).
        reader_threads: threads that read patches while the model works.
        torch_threads: threads of the model on a CPU; nothing given: all, shared between workers.
        max_unreadable: share of a slide's patches that may be undecodable before the slide counts as failed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    target: tuple[str, ...] = ()
    method: tuple[str, ...] = ("gradcam",)
    layer: str | None = None
    mpp: tuple[float, float] | None = None
    replace_mpp: bool = False
    patch_mpp: PositiveFloat | None = None
    patch_px: tuple[PositiveInt, PositiveInt] | None = None
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.0
    stride_px: PositiveInt | None = None
    min_tissue: Annotated[float, Field(ge=0, le=1)] = 0.1
    tissue: Literal["auto", "with-pen", "everything"] = "auto"
    mask: Path | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    heatmap_stride: PositiveInt = 16
    window: Literal["hann", "uniform"] = "hann"
    batch_size: PositiveInt | Literal["auto"] = 32
    span_patches: PositiveInt = 256
    device: str = "cpu"
    engine: Literal["auto", "eager", "compile", "openvino"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    reader: Literal["auto", "openslide", "tiff", "ome-zarr", "picture"] = "auto"
    trust_objective: bool = False
    reader_threads: PositiveInt = 2
    torch_threads: PositiveInt | None = None
    max_unreadable: Annotated[float, Field(ge=0, le=1)] = 0.01

    @model_validator(mode="before")
    @classmethod
    def _pairs(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for key in ("mpp", "patch_px"):
            if isinstance(values.get(key), int | float):
                values[key] = (values[key], values[key])
        for key in ("target", "include", "exclude"):
            if isinstance(values.get(key), str | int):
                values[key] = (values[key],)
            if isinstance(values.get(key), list | tuple):
                values[key] = tuple(str(v) for v in values[key])
        if isinstance(values.get("mask"), str | Path):
            values["mask"] = Path(values["mask"]).absolute()  # workers may run in another folder
        if isinstance(values.get("method"), str):
            values["method"] = tuple(name.strip() for name in values["method"].split(","))
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.heatmap_stride < 2 or self.heatmap_stride & (self.heatmap_stride - 1):
            raise ValueError(f"heatmap_stride is {self.heatmap_stride}, expected a power of two such as 16")
        if self.overlap and self.stride_px is not None:
            raise ValueError("overlap and stride_px say the same thing, give one of them")
        if not self.method or len(set(self.method)) != len(self.method):
            raise ValueError(f"method is {', '.join(self.method) or 'empty'}, expected names that differ")
        if isinstance(self.batch_size, int) and self.span_patches % self.batch_size:
            raise ValueError(
                f"span_patches is {self.span_patches}, expected a multiple of batch_size {self.batch_size}, "
                "so that batches are cut the same way everywhere"
            )
        return self

    def stride(self, patch_px: tuple[int, int]) -> tuple[int, int]:
        """(y, x) patch pixels from one patch to the next.

        >>> Settings(overlap=0.5).stride((224, 224))
        (112, 112)
        """
        if self.stride_px is not None:
            return self.stride_px, self.stride_px
        height, width = (max(1, round(size * (1 - self.overlap))) for size in patch_px)
        return height, width

    def identity(self) -> dict[str, Any]:
        """The settings that results depend on; two runs that differ here must not share an output."""
        return self.model_dump(mode="json", exclude=set(NOT_IN_IDENTITY))


def make_settings(**values: Any) -> Settings:
    """Settings from keyword arguments.

    Raises:
        ConfigError: an unknown key or an impossible value, on one line.
    """
    try:
        return Settings(**values)
    except ValidationError as error:
        raise ConfigError(explain_validation(error)) from error


def read_config(path: Path) -> dict[str, Any]:
    """The keys and values of a --config file, not yet validated.

    Raises:
        ConfigError: unreadable, or not a YAML mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values such as 'overlap: 0.5'")
    return {str(key): value for key, value in values.items()}
