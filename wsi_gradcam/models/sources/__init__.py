"""The sources of networks: each builds a network from a specification, `build_SOURCE(spec) -> Built`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from wsi_gradcam.models.spec import Activation, Resizing


@dataclass(frozen=True)
class Built:
    """A network with all that its source knows of it; None for what it does not know.

    Attributes:
        patch_px: (height, width) to be read from a slide; `resizing` turns it into the network's input.
        code_digest: identifies the source's code, unless that is a released package.
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
