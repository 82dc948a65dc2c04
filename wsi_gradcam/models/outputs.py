"""Networks that return more than logits, or probabilities, or are wrapped; and the names of their layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.graph import any_batch, with_points

# What libraries and papers call the logits, the clearest name first.
NAMES = ("logits", "out", "output", "outputs", "prediction", "predictions", "pred", "preds", "y", "y_hat")


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the network inside wrappers that compile it or run it on several devices, at any depth."""
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
        part._compiled_call_impl = None  # from `part.compile()`: hooks would not run
        for name, child in list(part.named_children()):
            if (plain := unwrapped(child)) is not child:
                setattr(part, name, plain)
    return network


class LogitsOf(nn.Module):
    """A network with one of its outputs selected: by key of a dict, or by position in a tuple or list.

    The output is given a row for each image: [B], [B, K, 1, 1] and, for a single image, [K] become [B, K]. With
    `output` None, the network's only output is used, for its shape alone. A network that changes its input in place is
    given `copies`, so that the same question gets the same answer. For a network that ends in a softmax or sigmoid, the
    output is the input of that, see `separate`.
    """

    def __init__(
        self, network: nn.Module, output: str | int | None, copies: bool = False, passed: Passed | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.output = output
        self.copies = copies
        self.passed = passed

    def forward(self, images: Tensor) -> Tensor:
        """Return the chosen output."""
        given = images.clone() if self.copies else images
        if self.passed is None:
            outputs = self.network(given)
        else:
            with _Calls(self.passed.columns * len(images), self.passed.numbers) as calls:
                outputs = self.network(given)
            if calls.count != self.passed.count:
                raise ModelError(
                    f"the model ends in {self.passed.name} after a different number of steps for these images than "
                    "before; return the values before it"
                )
        return as_rows(outputs if self.output is None else pick(outputs, self.output), len(images))


def with_logits(network: nn.Module, images: Tensor, output: str | int | None) -> tuple[nn.Module, Tensor]:
    """Return a network that returns logits [B, K] for `images`, the given one if it does, and these logits.

    `images` are not changed, even by a network that changes its input in place.

    Raises:
        ModelError: it is unclear which output is meant, or there is none called `output`.
    """
    given = images.clone()
    before = _version(given)
    outputs = network(given)
    copies = _version(given) != before or not torch.equal(given, images)
    chosen = find_output(outputs, len(images)) if output is None else output
    found = outputs if chosen is None else pick(outputs, chosen)
    rows = as_rows(found, len(images))
    return (network if rows is outputs and not copies else LogitsOf(network, chosen, copies)), rows


def one_row(network: nn.Module, image: Tensor) -> tuple[nn.Module, Tensor]:
    """Return a network that returns [1, K] for one image even if the given one squeezes it to [K]; and its logits."""
    alone = network(image)
    return (network, alone) if alone.ndim != 1 else (LogitsOf(network, None), as_rows(alone, 1))


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; tensors in inference mode do not count this."""
    return 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class Passed:
    """The last activations of a network, which now pass on their inputs.

    Attributes:
        name: softmax, sigmoid, log_softmax or log_sigmoid.
        numbers: numbers of its calls, among those with at most `columns` values per image; there are `count` of those.
    """

    name: str
    numbers: tuple[int, ...]
    count: int
    columns: int

    @property
    def activation(self) -> Literal["softmax", "sigmoid"]:
        """The function that turns logits into probabilities, by name."""
        return "softmax" if self.name.endswith("softmax") else "sigmoid"


EPSILON = 1e-4  # tolerance of a probability
SCALES = (10.0, -3.0, 0.0, 1000.0)  # scales of noise images: logits grow with them, or change sign
ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(dim=1),
    "sigmoid": torch.sigmoid,
    "log_softmax": lambda logits: logits.log_softmax(dim=1),
    "log_sigmoid": F.logsigmoid,
}
SAME = {"expit": "sigmoid", "logsigmoid": "log_sigmoid", "clip": "clamp"}
BOUNDS = dict.fromkeys(("softmax", "sigmoid", "hardsigmoid", "clamp", "hardtanh"), (0.0, 1.0)) | {"tanh": (-1.0, 1.0)}
MIXED = 64  # class-like values per image that may be averaged to one
END_MEND = "return the values before it, or set 'activation: none' in the model file to explain the outputs as they are"


class _Calls(TorchFunctionMode):
    """Follows the calls of activations with at most `most` values.

    Attributes:
        count: how many there were.
        found: the name of each and the number of its values, as long as they are not changed.
    """

    def __init__(self, most: int, passed: Sequence[int] = (), end: int | None = None) -> None:
        super().__init__()
        self._most, self._passed, self._end = most, passed, end
        self.count = 0
        self.found: list[tuple[str, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, unless its input is passed on or one end of its range is returned instead."""
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", "")).partition(".")[0].removeprefix("special_").strip("_")
        name = SAME.get(name, name)
        value = args[0] if args else kwargs.get("input")
        known = name in ENDS or name == "exp" or name in BOUNDS
        if not known or not isinstance(value, Tensor) or value.numel() > self._most:
            return func(*args, **kwargs)
        self.found.append((name, value.numel()))
        self.count += 1
        if self.count - 1 in self._passed:
            return value
        result = func(*args, **kwargs)
        return torch.full_like(result, BOUNDS[name][self._end]) if self._end is not None and name in BOUNDS else result


def separate(network: nn.Module, images: Tensor, rows: Tensor) -> tuple[nn.Module, Passed | None]:
    """Return the network that returns the logits of one that returns probabilities, and the activations left out.

    `network` returned `rows` [B, K] for `images`. This goes by values: the outputs are probabilities, or their
    logarithms, for noise of several scales, and they follow from what the network returns without these calls.

    Raises:
        ModelError: it returns probabilities, but their logits cannot be found.
    """
    if not _kind(rows):
        return network, None
    probes = [(images, rows), *((scale * images, network(scale * images)) for scale in SCALES)]
    probes = [(probe, found) for probe, found in probes if bool(torch.isfinite(found).all())]
    kinds = {_kind(found) for _, found in probes}
    if "" in kinds:
        return network, None
    for candidate in _plain_and_traced(network, images, "softmax" in kinds):
        for passed in _candidates(candidate, images, rows):
            separated = _without_end(candidate, passed)
            if all(_makes(separated, probe, found, passed) for probe, found in probes):
                return separated, passed
    _check_mixture(network, probes, kinds)
    return network, None


def _kind(rows: Tensor) -> str:
    """Return what outputs look like: softmax, sigmoid, log_softmax, log_sigmoid; "" for others."""
    if not bool(torch.isfinite(rows).all()):
        return ""
    several = rows.shape[1] > 1
    if float(rows.min()) >= -EPSILON and float(rows.max()) <= 1 + EPSILON:
        sums = several and float((rows.sum(dim=1) - 1).abs().max()) <= 10 * EPSILON
        return "softmax" if sums else "sigmoid"
    if float(rows.max()) > EPSILON:
        return ""
    return "log_softmax" if several and float(rows.logsumexp(dim=1).abs().max()) <= 10 * EPSILON else "log_sigmoid"


def _plain_and_traced(network: nn.Module, images: Tensor, sure: bool) -> Iterator[nn.Module]:
    """Yield the network, and then its graph: activations in parts that are TorchScript are not seen otherwise.

    Tracing takes a while, so this is done only for networks that have such parts or, if `sure`, an activation.
    """
    yield network
    if not sure and not any(isinstance(part, torch.jit.ScriptModule) for part in network.modules()):
        return
    try:
        graph = any_batch(network, images)
        for name, value in list(graph.named_parameters(recurse=False)):
            delattr(graph, name)
            graph.register_parameter(name, nn.Parameter(value.detach(), requires_grad=False))
        yield with_points(graph)
    except Exception:  # a network that cannot be followed may raise anything
        return


def _candidates(network: nn.Module, images: Tensor, rows: Tensor) -> Iterator[Passed]:
    """Yield calls that may be the network's last activations: one, or one for each of several heads."""
    columns = rows.shape[1]
    with _Calls(columns * len(images)) as calls:
        network(images)
    found = calls.found
    for last in reversed(range(len(found))):
        name, total = found[last]
        numbers = [last]
        for first in reversed(range(last)):
            if total >= rows.numel():
                break
            if found[first][0] == name:
                numbers.insert(0, first)
                total += found[first][1]
        if total == rows.numel() and name in ENDS:
            yield Passed(name, tuple(numbers), len(found), columns)
        if name == "exp" and last and found[last - 1][0] in ("log_softmax", "log_sigmoid"):
            yield Passed(found[last - 1][0].removeprefix("log_"), (last - 1, last), len(found), columns)


def _without_end(network: nn.Module, passed: Passed) -> LogitsOf:
    if isinstance(network, LogitsOf):
        return LogitsOf(network.network, network.output, network.copies, passed)
    return LogitsOf(network, None, passed=passed)


def _makes(separated: LogitsOf, images: Tensor, rows: Tensor, passed: Passed) -> bool:
    """Return whether the activation turns its input into the network's outputs."""
    try:
        logits = separated(images)
    except Exception:  # what follows may need probabilities
        return False
    if logits.shape != rows.shape or not bool(torch.isfinite(logits).all()):
        return False
    return torch.allclose(ENDS[passed.name](logits), rows, rtol=EPSILON, atol=EPSILON)


def _check_mixture(network: nn.Module, probes: Sequence[tuple[Tensor, Tensor]], kinds: set[str]) -> None:
    """Refuse averages and other mixtures of probabilities; outputs that merely happen to lie between 0 and 1 may pass.

    Raises:
        ModelError: the outputs are such mixtures.
    """
    images, rows = probes[0]
    varied = any(not torch.allclose(rows, found, atol=EPSILON) for _, found in probes[1:])
    mixed = kinds == {"softmax"} and varied
    if not mixed and kinds <= {"softmax", "sigmoid"}:
        ends = []
        for end in (0, 1):
            with _Calls(MIXED * rows.numel(), end=end) as calls:
                ends.append(network(images))
            if not calls.count:
                return
        mixed = all(torch.allclose(found, torch.full_like(found, end), atol=EPSILON) for end, found in enumerate(ends))
    if mixed:
        what = "rows between 0 and 1 that sum to 1" if kinds == {"softmax"} else "values bounded to 0..1"
        raise ModelError(
            f"the model returns probabilities ({what}), not logits, and no final softmax or sigmoid was found whose "
            f"input could be explained; {END_MEND}"
        )


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
            f"the model's output {output!r} is not a tensor; it returns {named}; set 'output:' to one of them"
        )
    return found


def find_output(outputs: Any, count: int) -> str | int | None:
    """Return the key of the logits among a network's outputs for `count` images; None for a single tensor.

    The output with one of the usual names (`NAMES`) is used, else the only one with a row for each image, else the
    first in a tuple if all have the same number of columns, as with auxiliary heads.

    Raises:
        ModelError: no output can be meant, or several.
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
    raise ModelError(f"{what}; its output is ambiguous: {choices}; choose with 'output:' in a model file")


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
