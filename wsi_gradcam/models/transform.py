"""The transform of a slide's patch into the network's input, as the model's own format declares it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.spec import MAX_SIDE_PX, Interpolation, Resizing

if TYPE_CHECKING:
    from numpy.typing import NDArray

Triple = tuple[float, float, float]
Size = tuple[int, int]

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


@dataclass(frozen=True)
class Transform:
    """Resize, crop, scale, subtract, divide: in this order, each left out if it changes nothing.

    Attributes:
        patch_px: (height, width) of what is read from the slide.
        resize_px: (height, width) to which the patch is resized; None if it is not.
        interpolation: interpolation used for resizing, by Pillow, which widens the filter to reduce (antialiasing).
        crop: (y, x, height, width) of the part that is kept, in pixels after resizing; None for all.
        scale: white before `mean` is subtracted: 1 for values of 0..1, 255 for 0..255.
        mean, std: of RGB, in units of `scale`.
    """

    patch_px: Size
    mean: Triple
    std: Triple
    scale: float = 1.0
    resize_px: Size | None = None
    interpolation: Interpolation = "bilinear"
    crop: tuple[int, int, int, int] | None = None

    @property
    def input_px(self) -> Size:
        """(height, width) of what the network sees."""
        return (self.crop[2], self.crop[3]) if self.crop else self.resize_px or self.patch_px

    @property
    def view(self) -> tuple[float, float, float, float]:
        """(y, x, height, width) of the part that the network sees, in pixels of the patch."""
        resized = self.resize_px or self.patch_px
        y, x, height, width = self.crop or (0, 0, *resized)
        by_y, by_x = self.patch_px[0] / resized[0], self.patch_px[1] / resized[1]
        return (y * by_y, x * by_x, height * by_y, width * by_x)

    def __call__(self, rgb: Tensor) -> Tensor:
        """Turn uint8 [B, H, W, 3] into float32 [B, 3, h, w] on the same device.

        Patches are as read, or as returned by `resized`. Without resizing, they may have any size that contains the
        crop. Resized pixels are rounded to 8 bits, as by Pillow and hence by torchvision on PIL images; then
        torchvision's exact arithmetic is applied.
        """
        if self.resize_px is None:
            return self._normalised(self._cropped(rgb))
        if tuple(rgb.shape[1:3]) != self.resize_px:
            rgb = torch.from_numpy(np.stack([self.resized(patch) for patch in rgb.cpu().numpy()])).to(rgb.device)
        images = self._cropped(rgb).permute(0, 3, 1, 2).contiguous().float()
        if self.scale != 255:
            images.div_(255 / self.scale)
        mean, std = (_constant(v, rgb.device) for v in (self.mean, self.std))
        return images.sub_(mean).div_(std)

    def _normalised(self, rgb: Tensor) -> Tensor:
        mean, std = (_constant(v, rgb.device, 255 / self.scale) for v in (self.mean, self.std))
        images = torch.empty(len(rgb), 3, *rgb.shape[1:3], device=rgb.device).copy_(rgb.permute(0, 3, 1, 2))
        return images.sub_(mean).div_(std)

    def _cropped(self, rgb: Tensor) -> Tensor:
        if self.crop is None:
            return rgb
        y, x, height, width = self.crop
        return rgb[:, y : y + height, x : x + width]

    def resized(self, patch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return a patch uint8 [H, W, 3] in the size of `resize_px`, or itself if that is None.

        Raises:
            ModelError: its size is not `patch_px`.
        """
        if self.resize_px is None:
            return patch
        if patch.shape[:2] != self.patch_px:
            raise ModelError(f"patches of {patch.shape[:2]} px were given, expected {self.patch_px}")
        height, width = self.resize_px
        return np.asarray(Image.fromarray(patch).resize((width, height), RESAMPLING[self.interpolation]))


@lru_cache(maxsize=64)
def _constant(values: Triple, device: torch.device, factor: float | None = None) -> Tensor:
    """Return a number for each colour, [3, 1, 1], copied to a device once: a copy for each batch would wait for it."""
    with torch.inference_mode(False):  # even for a caller in inference mode: another may want gradients
        constant = torch.tensor(values)[:, None, None].to(device)
        return constant if factor is None else constant * factor


def make_transform(
    patch_px: Size, mean: Triple, std: Triple, scale: float = 1.0, resizing: Resizing | None = None
) -> Transform:
    """Return the transform of patches of `patch_px`, with resizing and crop worked out as torchvision does.

    Raises:
        ModelError: the crop is larger than what it is cut from, or a side is longer than any patch.
    """
    resizing = resizing or Resizing()
    resized = resized_px(resizing.resize, patch_px) if resizing.resize else patch_px
    if max(*patch_px, *resized) > MAX_SIDE_PX or min(*patch_px, *resized) < 1:
        raise ModelError(f"patches of {patch_px} px, resized to {resized}: sides must be 1 to {MAX_SIDE_PX} px")
    crop = centre(resizing.crop, resized, resizing.crop_rounds) if resizing.crop else None
    return Transform(
        patch_px=patch_px,
        mean=mean,
        std=std,
        scale=scale,
        resize_px=None if resized == patch_px else resized,
        interpolation=resizing.interpolation,
        crop=None if crop == (0, 0, *resized) else crop,
    )


def resized_px(size: int | Size, patch_px: Size) -> Size:
    """Return (height, width) after resizing to `size`, the length of the shorter side or of both.

    >>> resized_px(224, (350, 500)), resized_px((224, 200), (350, 500))
    ((224, 320), (224, 200))
    """
    if not isinstance(size, int):
        return size
    height, width = patch_px
    return (size, int(size * width / height)) if height <= width else (int(size * height / width), size)


def centre(size: int | Size, outer: Size, rounds: bool = True) -> tuple[int, int, int, int]:
    """Return (y, x, height, width) of the centre crop; if half a pixel off, `rounds` to even or else down.

    >>> centre(224, (256, 259)), centre(224, (256, 259), rounds=False)
    ((16, 18, 224, 224), (16, 17, 224, 224))
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height > outer[0] or width > outer[1]:
        raise ModelError(f"a crop of ({height}, {width}) px does not fit in {outer} px; make patch_px or resize larger")
    y, x = (outer[0] - height) / 2, (outer[1] - width) / 2
    return (round(y), round(x), height, width) if rounds else (int(y), int(x), height, width)
