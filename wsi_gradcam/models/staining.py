"""The stain normalisation that a model file asks for: a method, and the stain to which tissue is normalised."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveFloat, Tag, model_validator

from wsi_gradcam.errors import ModelError, StainError
from wsi_gradcam.io.local import check_regular

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.tissue.stain import Stain

Density = Annotated[float, Field(ge=0)]
Lightness = Annotated[float, Field(ge=0, le=100)]
Chroma = Annotated[float, Field(ge=-128, le=128)]

FORMATS = ("PNG", "JPEG", "TIFF")
MAX_TARGET_PX = 1 << 26  # pixels of a target's picture: anything larger is a slide by mistake
MEASURED_PX = 1 << 20  # pixels of it, evenly spaced
MIN_ANGLE_DEG = 3.0  # two stains that are closer to each other are one


class MacenkoTarget(BaseModel):
    """Optical densities of (red, green, blue) of haematoxylin and of eosin, and the 99th percentile of each."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    stains: tuple[tuple[Density, Density, Density], tuple[Density, Density, Density]]
    concentrations: tuple[PositiveFloat, PositiveFloat]

    @model_validator(mode="after")
    def _two_stains(self) -> MacenkoTarget:
        haematoxylin, eosin = np.asarray(self.stains)
        lengths = np.linalg.norm(haematoxylin) * np.linalg.norm(eosin)
        if lengths == 0 or haematoxylin @ eosin / lengths > np.cos(np.radians(MIN_ANGLE_DEG)):
            raise ValueError("the stains must be two different colours, haematoxylin and eosin")
        return self


class ReinhardTarget(BaseModel):
    """Mean and standard deviation of L* (0 to 100), a* and b*."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mean: tuple[Lightness, Chroma, Chroma]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]


def _form(target: object) -> str:
    if isinstance(target, str):
        return "picture"
    keys = target if isinstance(target, dict) else getattr(target, "__dict__", {})
    return "macenko" if "stains" in keys or "concentrations" in keys else "reinhard"


Target = Annotated[
    Annotated[str, Tag("picture")]
    | Annotated[MacenkoTarget, Tag("macenko")]
    | Annotated[ReinhardTarget, Tag("reinhard")],
    Discriminator(_form),
]


class StainSpec(BaseModel):
    """Stain normalisation of patches before the network sees them.

    Attributes:
        method: macenko, reinhard or none.
        target: the stain to which tissue is normalised: a picture beside the model file, or the method's numbers;
            published ones if left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["none", "macenko", "reinhard"]
    target: Target | None = None

    @model_validator(mode="after")
    def _of_the_method(self) -> StainSpec:
        if self.target is not None and self.method == "none":
            raise ValueError("method none takes no target; leave the target out, or choose macenko or reinhard")
        if self.target is not None and _form(self.target) not in ("picture", self.method):
            keys = "stains, concentrations" if self.method == "macenko" else "mean, std"
            raise ValueError(f"the target's keys are not those of {self.method}: {keys}")
        return self


def stain_target(spec: StainSpec | None, folder: Path) -> Stain | None:
    """Return the stain to which tissue is normalised; None to change nothing. Pictures are relative to `folder`.

    Raises:
        ModelError: the picture cannot be read, or shows no stain.
    """
    if spec is None:
        return None
    from wsi_gradcam.tissue.stain import PUBLISHED, measure, stain_from_json

    if spec.target is None:
        return PUBLISHED[spec.method]
    if not isinstance(spec.target, str):
        return stain_from_json({"method": spec.method, **spec.target.model_dump()})
    path = folder / Path(spec.target).expanduser()
    try:
        return measure(_pixels(path), spec.method)
    except StainError as error:
        raise ModelError(f"{path}: no target for {spec.method}: {error}; give an image of stained tissue") from error


def _pixels(path: Path) -> NDArray[np.uint8]:
    """Return RGB uint8 [n, 3] of a picture, sampled evenly."""
    try:
        check_regular(path)
        with Image.open(path, formats=FORMATS) as picture:
            if picture.format == "JPEG":
                from wsi_gradcam.slides.tiff_streams import check_jpeg  # not imported above: a client stays thin

                check_jpeg(path.read_bytes())
            if picture.mode != "RGB" or picture.width * picture.height > MAX_TARGET_PX:
                raise ModelError(
                    f"{path}: an image of {picture.width} x {picture.height} px, {picture.mode}; expected 8-bit RGB of "
                    f"at most {MAX_TARGET_PX} px as stain target"
                )
            rgb = np.asarray(picture).reshape(-1, 3)
    except ModelError:
        raise
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such stain target; paths are relative to the model file") from error
    except Exception as error:  # damaged pictures raise many errors
        raise ModelError(
            f"{path}: not an image ({type(error).__name__}); give a PNG or JPEG as stain target"
        ) from error
    return rgb[:: -(-len(rgb) // MEASURED_PX)]
