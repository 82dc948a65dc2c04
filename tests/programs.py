"""Networks saved as programs in every way that sources take: scripted, traced, frozen, exported."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORMS = ["script", "trace", "frozen", "export", "export-dynamic"]


def save_program(network: nn.Module, images: Tensor, form: str, folder: Path) -> Path:
    """Save `network` as `form` into a folder, with `images` as the example where one is needed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, but its files are what people have
        if form.startswith("export"):
            dynamic: Any = ({0: torch.export.Dim.DYNAMIC},) if form == "export-dynamic" else None
            path = folder / "model.pt2"
            torch.export.save(torch.export.export(network, (images,), dynamic_shapes=dynamic), path)
            return path
        path, jit = folder / "model.pt", torch.jit
        if form == "trace":
            program: Any = jit.trace(network, images, check_trace=False)  # type: ignore[no-untyped-call]
        else:
            program = jit.script(network)
        jit.save(jit.freeze(program) if form == "frozen" else program, path)
        return path


def lively(network: nn.Module, images: Tensor) -> nn.Module:
    """The network in evaluation mode, its normalisations set to `images`: untrained ones answer alike for all.

    Channels that hardly vary are not blown up, as rounding in them would be.
    """
    norms = [part for part in network.eval().modules() if isinstance(part, nn.BatchNorm2d)]
    for part in norms:
        part.momentum = 1.0
        part.train()
    with torch.no_grad():
        network(images)
        for part in norms:
            assert part.running_var is not None
            part.running_var.clamp_(min=0.3 * float(part.running_var.mean()))
    return network.eval()


class Small(nn.Module):
    """Two convolutions, average pooling and a linear layer, in words that TorchScript understands."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 5, stride=4, padding=2), nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.fc = nn.Linear(12, classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.relu_(self.conv2(torch.relu_(self.conv1(images))))
        return self.fc(maps.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def small(classes: int = 2, seed: int = 0) -> Small:
    """A small network, the same for the same seed."""
    torch.manual_seed(seed)
    network = Small(classes)
    network.eval()
    return network
