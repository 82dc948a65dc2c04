"""A model under audit: its answers to pictures, and maps of them, for what was explained originally.

Also control maps that know nothing about the model. They are made on the grid of the map with which they are compared,
so that the two differ in what they know and not in how sharp they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from wsi_gradcam.audit.schema import CENTRE, CONSTANT, EDGES, RANDOM
from wsi_gradcam.cam.engine import AnyTarget, explain_batch
from wsi_gradcam.cam.explainer import Request, examine
from wsi_gradcam.cam.program import EagerProgram
from wsi_gradcam.cam.targets import Target, classes_of, make_score
from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.spec import Activation, probabilities

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from wsi_gradcam.cam.methods import Score
    from wsi_gradcam.models.load import Model


@dataclass(frozen=True, eq=False)
class Aim:
    """The explained scalar of each of P patches, fixed by the answers to the unchanged patches.

    A changed patch, or a changed model, may predict another class; the original one is explained all the same.

    Attributes:
        target: as everywhere; `predicted` means each patch's own class.
        logits: [P, K] of the unchanged patches.
        activation: how logits become probabilities.
    """

    target: AnyTarget
    logits: Tensor
    activation: Activation

    @property
    def classes(self) -> Tensor | None:
        """The class [P] for which each patch is explained, on the CPU; None if no class is explained."""
        if not isinstance(self.target, Target) or not self.target.is_class:
            return None
        return classes_of(self.target, self.logits).cpu()

    def score(self, rows: slice = slice(None)) -> Score:
        """Return the explained scalar [n] as a function of logits [n, K] for the patches `rows`."""
        return make_score(self.target, self.logits[rows])

    def explained(self, rows: slice) -> AnyTarget:
        """Return the target of a method for the patches `rows`."""
        fixed = isinstance(self.target, Target) and self.target.index is not None
        return self.target if fixed else self.score(rows)

    def logit(self, answers: Tensor) -> Tensor:
        """Return the explained scalar [P, ...] from `answers` [P, ..., K]."""
        points = answers.reshape(len(answers), -1, answers.shape[-1])
        score = self.score()
        values = torch.stack([score(point) for point in points.unbind(dim=1)], dim=1)
        return values.reshape(answers.shape[:-1])

    def probability(self, answers: Tensor) -> Tensor | None:
        """Return the class's probability [P, ...] from `answers` [P, ..., K]; None if no class is explained."""
        if (own := self.classes) is None:
            return None
        flat = answers.detach().float().cpu().reshape(-1, answers.shape[-1])
        shares = torch.from_numpy(probabilities(flat.numpy(), self.activation)).reshape(len(answers), -1, flat.shape[1])
        classes = own[:, None, None].expand(-1, shares.shape[1], 1)
        return shares.gather(2, classes).reshape(answers.shape[:-1]).to(answers.device)


@dataclass(frozen=True, eq=False)
class Subject:
    """A model under audit. All work is done in batches, so that memory depends only on their size.

    Attributes:
        model: the model to which patches and probabilities belong.
        program: the program that explains it.
        batch_size: images in a forward pass.
    """

    model: Model
    program: EagerProgram
    batch_size: int = 32

    @classmethod
    def of(
        cls, model: Model, methods: Sequence[str] = ("gradcam",), layer: str | None = None, batch_size: int = 32
    ) -> Subject:
        """Return the subject of a loaded model, explained in eager float32.

        Raises:
            LayerError: a method cannot explain it.
            ModelError: its output is not finite.
        """
        program = examine(model, Request(layer=layer, methods=tuple(methods), batch_size=batch_size)).program
        assert isinstance(program, EagerProgram)
        return cls(model, program, batch_size)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(iter(self.program.module.parameters()), torch.empty(0)).device

    def images(self, rgb: NDArray[np.uint8]) -> Tensor:
        """Return patches uint8 [P, h, w, 3] in the form that the network sees, float32 [P, 3, H, W].

        Raises:
            ModelError: these are not patches.
        """
        if rgb.ndim != 4 or rgb.shape[3] != 3 or rgb.dtype != "uint8" or not len(rgb):
            raise ModelError(f"patches are {rgb.dtype} {rgb.shape}, expected uint8 [patches, height, width, 3]")
        return self.model.prepare(torch.from_numpy(rgb).to(self.device))

    def colour(self, rgb: tuple[int, int, int]) -> Tensor:
        """Return a colour in the form that the network sees, [3, 1, 1]."""
        flat = torch.tensor(rgb, dtype=torch.uint8).expand(1, *self.model.patch_px, 3)
        return self.model.prepare(flat.contiguous().to(self.device))[0, :, :1, :1]

    def answers(self, images: Tensor) -> Tensor:
        """Return logits [P, K] of images [P, 3, H, W], without a graph."""
        return torch.cat([self.program.predict(part).detach() for part in torch.split(images, self.batch_size)])

    def aim(self, images: Tensor, target: AnyTarget) -> Aim:
        """Return the aim of `images`, which stays the same whatever happens to them."""
        return Aim(target, self.answers(images), self.model.activation)

    def maps(self, images: Tensor, aim: Aim, method: str = "gradcam") -> Tensor:
        """Return raw signed maps [P, h, w] of images [P, 3, H, W], on the method's own grid."""
        found = []
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            found.append(explain_batch(self.program, images[rows], [aim.explained(rows)], [method]).cams[method][:, 0])
        return torch.cat(found)

    def with_module(self, module: nn.Module) -> Subject:
        """Return the subject with another network of the same architecture, such as one whose weights were changed."""
        return replace(self, program=EagerProgram(module, self.program.layers))


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps [P, h, w] at another (height, width): bilinear if larger, means if smaller."""
    if maps.shape[1] > size[0]:
        return F.adaptive_avg_pool2d(maps[:, None], size)[:, 0]
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def predicted_classes(logits: Tensor) -> Tensor:
    """Return the predicted class of logits [..., K]; of a single logit, its sign."""
    return logits.argmax(dim=-1) if logits.shape[-1] > 1 else (logits[..., 0] > 0).long()


def control_maps(images: Tensor, grid: tuple[int, int], seeds: Sequence[int]) -> dict[str, Tensor]:
    """Return all controls [P, h, w] by name for images [P, 3, H, W], with a seed per patch: batches do not matter."""
    return {
        RANDOM: random_maps(grid, seeds).to(images.device),
        EDGES: edge_maps(images, grid),
        CONSTANT: images.new_ones(len(images), *grid),
        CENTRE: centre_maps(grid).to(images.device).expand(len(images), -1, -1),
    }


def random_maps(grid: tuple[int, int], seeds: Sequence[int]) -> Tensor:
    """Return Gaussian noise [P, h, w]."""
    return torch.stack([torch.randn(grid, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def edge_maps(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return edge strength, [P, h, w], non-negative: Sobel's gradient of the mean colour, averaged."""
    gray = F.pad(images.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = images.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    steepness = F.conv2d(gray, torch.stack([across, across.T])[:, None]).norm(dim=1)
    return enlarge(steepness, grid)


def centre_maps(grid: tuple[int, int]) -> Tensor:
    """Return a map [1, h, w] that falls from the middle to the borders: minus the squared distance, in half sides."""
    height, width = grid
    y, x = ((torch.arange(n) + 0.5) * 2 / n - 1 for n in (height, width))
    return -(y[:, None] ** 2 + x[None, :] ** 2)[None]


REACH = 1.5  # footprints from which a probability still counts in a map of probabilities


def probability_maps(
    yx: NDArray[np.int64],
    places: NDArray[np.int64],
    shares: NDArray[np.float32],
    footprint: tuple[float, float],
    grid: tuple[int, int],
) -> NDArray[np.float32]:
    """Return maps of the probabilities of patches round about alone, on patches at `yx`, [n, classes, h, w].

    At each cell the mean of `shares` [N, classes] of the patches at `places` [N, 2], weighed by a Gaussian of the
    distance of their centres, of half a footprint. It knows what the model answers, and nothing of why.
    """
    cells = np.stack(np.meshgrid(*((np.arange(n) + 0.5) / n for n in grid), indexing="ij"), axis=-1).reshape(-1, 2)
    found = np.zeros((len(yx), shares.shape[1], len(cells)), np.float32)
    size = np.array(footprint)
    for i, corner in enumerate(yx):
        near = (np.abs(places - corner) < REACH * size).all(axis=1)
        centres = (places[near] - corner) / size + 0.5
        squares = ((cells[:, None] - centres[None]) ** 2).sum(axis=-1) / (2 * 0.5**2)
        weight = np.exp(-squares)
        found[i] = (weight @ shares[near] / weight.sum(axis=1, keepdims=True)).T
    return found.reshape(len(yx), shares.shape[1], *grid)
