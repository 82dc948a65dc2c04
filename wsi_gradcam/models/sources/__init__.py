"""Where networks come from: one module per kind of source, each with `build(argument, spec)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from wsi_gradcam.models.spec import Activation, Resizing


@dataclass(frozen=True)
class Built:
    """A network and what its source knows of it; None where it does not.

    `patch_px` is what is to be read from a slide, `resizing` how that becomes the network's input.
    `code_digest` identifies the source's code where that is not a released package.
    """

    module: nn.Module
    classes: tuple[str, ...] | None = None
    patch_px: tuple[int, int] | None = None
    mpp: float | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    scale: float | None = None
    resizing: Resizing | None = None
    activation: Activation | None = None
    license: str | None = None
    code_digest: str = ""
