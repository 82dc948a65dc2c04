"""Networks that return more than logits or are wrapped, and the names of their layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wsi_gradcam.errors import ModelError

# What libraries and papers call the logits, the clearest name first.
NAMES = ("logits", "out", "output", "outputs", "prediction", "predictions", "pred", "preds", "y", "y_hat")


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the network inside wrappers that compile it or run it on several devices, at any depth of them."""
    while True:
        compiled = getattr(network, "_orig_mod", None)
        if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
            network = network.module
        elif type(network).__name__ == "OptimizedModule" and isinstance(compiled, nn.Module):
            network = compiled
        else:
            return network


def unwrap_parts(network: nn.Module) -> nn.Module:
    """Return the network without such wrappers around it or any part of it; changes `network`."""
    network = unwrapped(network)
    for part in list(network.modules()):
        part._compiled_call_impl = None  # of `part.compile()`: hooks would not run
        for name, child in list(part.named_children()):
            if (plain := unwrapped(child)) is not child:
                setattr(part, name, plain)
    return network


class LogitsOf(nn.Module):
    """A network of which one output is taken: by key of a dict, or by place in a tuple or list.

    The output is given a row for each image: [B], [B, K, 1, 1] and, for a single image, [K] become [B, K].
    With `output` None the network's only output is taken, for its shape alone. A network that changes its input in
    place is given `copies`, so that whoever asks twice asks the same.
    """

    def __init__(self, network: nn.Module, output: str | int | None, copies: bool = False) -> None:
        super().__init__()
        self.network = network
        self.output = output
        self.copies = copies

    def forward(self, images: Tensor) -> Tensor:
        """Return the chosen output."""
        outputs = self.network(images.clone() if self.copies else images)
        return as_rows(outputs if self.output is None else pick(outputs, self.output), len(images))


def with_logits(network: nn.Module, images: Tensor, output: str | int | None) -> tuple[nn.Module, Tensor]:
    """Return a network that gives logits [B, K] for `images`, the given one if it does, and these logits.

    `images` stay as they are, also under a network that changes its input in place.

    Raises:
        ModelError: which output is meant is not clear, or there is none called `output`.
    """
    given = images.clone()
    before = _version(given)
    outputs = network(given)
    copies = _version(given) != before or not torch.equal(given, images)
    chosen = find_output(outputs, len(images)) if output is None else output
    found = outputs if chosen is None else pick(outputs, chosen)
    rows = as_rows(found, len(images))
    return (network if rows is outputs and not copies else LogitsOf(network, chosen, copies)), rows


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; tensors of inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version


def as_rows(output: Tensor, count: int) -> Tensor:
    """Return [B], [B, K, 1, 1] and, for one image, [K] as [B, K]; other shapes as they are. `count` is B."""
    if output.ndim == 2 and len(output) == count:
        return output
    row_each = output.shape[:1] == (count,)
    pooled = row_each and output.ndim == 4 and output.shape[2:] == (1, 1)
    single = count == 1 and output.ndim <= 1
    return output.reshape(count, -1) if pooled or single or (row_each and output.ndim == 1) else output


def pick(outputs: Any, output: str | int) -> Tensor:
    """Return the tensor called `output` among a network's outputs.

    Raises:
        ModelError: there is none.
    """
    if isinstance(outputs, Mapping):
        found, named = outputs.get(str(output)), ", ".join(map(str, outputs))
    elif isinstance(outputs, Sequence):
        index = int(output) if str(output).lstrip("-").isdecimal() else _field(outputs, str(output))
        found = outputs[index] if -len(outputs) <= index < len(outputs) else None
        named = f"0 to {len(outputs) - 1}"
    else:
        found, named = getattr(outputs, str(output), None), type(outputs).__name__
    if not isinstance(found, Tensor):
        raise ModelError(
            f"the model's output {output!r} is no tensor; it returns {named}; set 'output:' to one of them"
        )
    return found


def find_output(outputs: Any, count: int) -> str | int | None:
    """Return the key of the logits among a network's outputs for `count` images; None for a single tensor.

    Taken is what bears one of the usual names (`NAMES`), else the only output with a row for each image, else the
    first of a tuple's if all have equally many columns, as with auxiliary heads.

    Raises:
        ModelError: none or several can be meant.
    """
    if isinstance(outputs, Tensor):
        return None
    if isinstance(outputs, Mapping):
        named: dict[str | int, Any] = {str(key): value for key, value in outputs.items()}
    elif isinstance(outputs, Sequence) and not isinstance(outputs, str):
        fields = getattr(outputs, "_fields", None)
        named = dict(zip(fields or range(len(outputs)), outputs, strict=True))
    else:
        named = {name: getattr(outputs, name) for name in NAMES if hasattr(outputs, name)}
    columns = {key: as_rows(v, count).shape[1] for key, v in named.items() if _could_be_logits(v, count)}
    for name in NAMES:
        if name in columns:
            return name
    if len(columns) == 1 or (isinstance(outputs, Sequence) and len(set(columns.values())) == 1):
        return next(iter(columns))
    what = f"returns a {type(outputs).__name__}, expected a tensor of shape (batch, classes)"
    if not columns:
        raise ModelError(f"{what} or one among others; wrap the model so that it returns one logit per class")
    choices = ", ".join(f"{key} ({width} columns)" for key, width in columns.items())
    raise ModelError(f"{what}; several of its outputs can be meant: {choices}; choose with 'output:' in a model file")


def named_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the submodules by the names that users know: those in the network itself."""
    network = module.network if isinstance(module, LogitsOf) else module
    assert isinstance(network, nn.Module)
    return {name: part for name, part in network.named_modules() if name}


def _could_be_logits(value: Any, count: int) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    rows = as_rows(value, count)
    return rows.ndim == 2 and len(rows) == count and rows.shape[1] > 0


def _field(outputs: Sequence[Any], name: str) -> int:
    fields = getattr(outputs, "_fields", ())
    return fields.index(name) if name in fields else len(outputs)
