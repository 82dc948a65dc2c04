"""`load_aggregator`: turns the state dicts of published slide-level models, and programs, into networks.

The names in a state dict say which part a layer is, and the shapes give all sizes. Layers that have no part in the
network, or do not fit their neighbours, are named in errors; activations leave no trace and are taken from the code
that uses these names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wsi_gradcam.errors import DocumentError, ModelError, one_line, printable, shortened
from wsi_gradcam.io.documents import MAX_BYTES, read_json
from wsi_gradcam.io.local import read_file
from wsi_gradcam.mil.networks import (
    Aggregator,
    AttentionPool,
    Dsmil,
    Mlp,
    NystromAttention,
    TransMil,
    convolution,
    linear,
    opaque,
)
from wsi_gradcam.models.load import check_files, check_numbers
from wsi_gradcam.models.sources import LIGHTNING, WRAPPERS, is_lightning, states_in
from wsi_gradcam.models.sources.programs import load_script
from wsi_gradcam.models.sources.python import build_function
from wsi_gradcam.models.spec import ModelSpec
from wsi_gradcam.system.processes import tensors_only

if TYPE_CHECKING:
    from pathlib import Path

    from wsi_gradcam.mil.spec import AggregatorSpec, SlideModelSpec

MAX_NUMBERS = 1 << 28  # numbers of all weights: a view in a small file may claim any shape
MAX_TENSORS, MAX_PREFIXES, MAX_PREFIX = 4096, 32, 4  # prefixes that are tried, and parts of a prefix
ATTENTION_PARTS = (
    ("gate_a", r"(?:.*\.)?attention_[aV](?:\.(\d+))?"),
    ("gate_b", r"(?:.*\.)?attention_[bU](?:\.(\d+))?"),
    ("score", r"(?:.*\.)?attention_(?:c|w|weights)(?:\.(\d+))?"),
    ("plain", r"(?:attention|attn|global_attn|attention_net\.\d+)\.(\d+)"),
    ("embed", r"linear_layers\.(\d+)\.0"),
    ("embed", r"(?:patch_embed|attention_net|embed(?:ding)?|encoder|feature_extractor\w*|_?fc1)(?:\.(\d+))?"),
    ("out", r"out_layers\.(\d+)\.0"),
    ("head", r"(?:classifiers?|head|_?fc2)(?:\.(\d+))?"),
    ("ignored", r"instance_classifiers\.(\d+)|instance_loss_fn.*"),
)
DSMIL_PARTS = (
    ("instance", r"i_classifier\.(?:fc(?:\.0)?|inst_classifier)"),
    ("query", r"b_classifier\.q(?:\.(\d+))?"),
    ("value", r"b_classifier\.v(?:\.(\d+))?"),
    ("lin", r"b_classifier\.lin\.(\d+)"),
    ("norm", r"b_classifier\.norm"),
    ("fcc", r"b_classifier\.fcc"),
    ("embed", r"patch_embed\.(\d+)"),
    ("head", r"classifier"),
    ("ignored", r"i_classifier\.feature_extractor.*"),
)
_BLOCK = r"(?:layer|blocks\.|translayers\.)(\d+)"
TRANSMIL_PARTS = (
    ("embed", r"(?:_fc1|patch_embed)\.(\d+)"),
    ("token", r"cls_token"),
    ("block_norm", rf"{_BLOCK}\.norm"),
    ("qkv", rf"{_BLOCK}\.att(?:n|ention)\.to_qkv"),
    ("joined", rf"{_BLOCK}\.att(?:n|ention)\.to_out\.0"),
    ("conv", rf"{_BLOCK}\.att(?:n|ention)\.res_conv"),
    ("ppeg", r"pos_layer\.proj(\d?)"),
    ("norm", r"norm"),
    ("head", r"_fc2|classifier"),
)
PARTS = {"abmil": ATTENTION_PARTS, "clam": ATTENTION_PARTS, "dsmil": DSMIL_PARTS, "transmil": TRANSMIL_PARTS}


@dataclass(frozen=True)
class LoadedAggregator:
    """An aggregator ready to explain bags.

    Attributes:
        network: in evaluation mode, in float32, with frozen parameters.
        classes: names of its K logits.
        digest: sha256 of the weights, the source and everything that changes its answers.
        notes: which parts of its files were used and which were not, one line each.
    """

    network: Aggregator
    classes: tuple[str, ...]
    digest: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layers:
    """The layers of a state dict by their part in the network, each part in the order of its numbers.

    Attributes:
        where: the file, for messages.
        parts: maps a part to (number, name, weight, bias).
        notes: what is not used.
    """

    where: str
    parts: Mapping[str, Sequence[tuple[int, str, Tensor, Tensor | None]]]
    notes: tuple[str, ...] = ()

    def count(self, part: str) -> int:
        """Return the number of layers in a part."""
        return len(self.parts.get(part, ()))

    def linear(self, part: str, inputs: int | None = None) -> nn.Linear:
        """Return the only layer of a part, which takes vectors of length `inputs`."""
        layers = self.stack(part, inputs)
        if len(layers) != 1:
            raise ModelError(f"{self.where}: {len(layers)} layers are {self._names(part)}, expected one")
        return layers[0]

    def stack(self, part: str, inputs: int | None = None) -> list[nn.Linear]:
        """Return the linear layers of a part, each of which takes the previous one's output."""
        layers: list[nn.Linear] = []
        for _, name, weight, bias in self.parts.get(part, ()):
            flat = weight.flatten(1) if weight.ndim == 3 else weight  # a convolution over its whole input
            expected = f"(*, {inputs or '*'})"
            if flat.ndim != 2 or inputs not in (None, flat.shape[1]):
                raise self.misfit(name, weight, expected)
            if bias is not None and bias.shape != flat.shape[:1]:
                raise self.misfit(name, bias, f"({len(flat)},)", "bias")
            layers.append(linear(flat, bias))
            inputs = len(flat)
        return layers

    def norm(self, part: str, number: int, width: int) -> nn.LayerNorm:
        """Return the LayerNorm of a part."""
        _, name, weight, bias = self.layer(part, number)
        if weight.shape != (width,):
            raise self.misfit(name, weight, f"({width},)")
        layer = nn.LayerNorm(width, bias=bias is not None)
        layer.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias})})
        return layer

    def layer(self, part: str, number: int) -> tuple[int, str, Tensor, Tensor | None]:
        """Return the layer with a number in a part."""
        for each in self.parts.get(part, ()):
            if each[0] == number:
                return each
        raise ModelError(f"{self.where}: no weights for {part} {number}; is the 'source:' the right network?")

    def require(self, *parts: str) -> None:
        """Refuse a state dict that lacks parts."""
        if missing := [part for part in parts if not self.count(part)]:
            have = ", ".join(name for part in self.parts.values() for _, name, _, _ in part)
            raise ModelError(
                f"{self.where}: no layer that could be {' or '.join(missing)}; it has {shortened(have, 300)}; is the "
                "'source:' the network that it was saved from?"
            )

    def misfit(self, name: str, tensor: Tensor, expected: str, kind: str = "weight") -> ModelError:
        """Return the error for a tensor of another shape."""
        shape = tuple(tensor.shape)
        return ModelError(f"{self.where}: {printable(name)}.{kind} has shape {shape}, expected {expected}")

    def _names(self, part: str) -> str:
        return ", ".join(name for _, name, _, _ in self.parts.get(part, ())) or f"none of {part}"


def load_aggregator(spec: SlideModelSpec) -> LoadedAggregator:
    """Load the aggregator of a slide-level model.

    Its file is first compared with a given `sha256`, then permission is checked; only then is anything imported,
    unpickled or run.

    Raises:
        ModelError: files are missing or not the right ones, weights do not fit (with their names), code is not allowed
            to run, or the numbers of classes and logits differ.
    """
    files = _files(spec)
    check_files(files)
    spec.check_trusted()
    network, notes, code = _build(spec, files)
    check_numbers(spec.name, network)
    for parameter in network.eval().float().parameters():
        parameter.requires_grad_(False)
    classes = spec.classes or tuple(str(k) for k in range(network.class_count))
    if len(classes) != network.class_count:
        raise ModelError(f"{spec.name}: {len(classes)} classes are named, but it gives {network.class_count} logits")
    if network.class_count == 1 and spec.activation == "softmax":
        raise ModelError(f"{spec.name}: the softmax of a single logit is always 1; add 'activation: sigmoid' (or none)")
    return LoadedAggregator(network, classes, _digest(spec, network, classes, code), notes)


def _files(spec: SlideModelSpec) -> ModelSpec:
    """Return the specification in the form that the checks of patch models' files take."""
    part = spec.aggregator
    source, weights = part.source, part.weights
    if part.kind == "mil-lab":
        source, weights = "mil-lab:folder", f"{part.argument}/model.safetensors"
    elif part.kind not in ("torchscript", "function"):
        source = f"{part.kind}:network"
        if weights is None:
            raise ModelError(f"{spec.name}: aggregator: {part.kind} needs a state dict; give it with 'weights:'")
    elif weights is not None:
        raise ModelError(f"{spec.name}: aggregator: the weights are in {part.source}; leave out 'weights: {weights}'")
    files = ModelSpec(name=spec.name, source=source, weights=weights, sha256=part.sha256, folder=part.folder)
    return files.trusting(spec.trusted)


def _build(spec: SlideModelSpec, files: ModelSpec) -> tuple[Aggregator, tuple[str, ...], str]:
    """Return the network, notes, and the digest of its code."""
    part = spec.aggregator
    known = f"{spec.name}: {part.source}", part.feature_dim, part.output
    if part.kind == "function":
        built = build_function(files)
        return opaque(built.module, *known), (), built.code_digest
    if part.kind == "torchscript":
        assert files.source_path is not None
        with tensors_only():
            script = load_script(files.source_path, read_file(files.source_path))
        return opaque(script, *known), (), check_files(files, always=True)
    assert files.weights_path is not None
    kind, part = (part.kind, part) if part.kind != "mil-lab" else _of_folder(part, files.weights_path.parent)
    network, notes = network_of(kind, part, files.weights_path)
    return network, notes, ""


def _of_folder(part: AggregatorSpec, folder: Path) -> tuple[str, AggregatorSpec]:
    """Return the kind of network in a MIL-Lab folder, and what its configuration says that weights do not."""
    try:
        config = read_json(read_file(folder / "config.json", MAX_BYTES))
    except (DocumentError, OSError) as error:
        raise ModelError(f"{folder / 'config.json'}: cannot be read: {one_line(error)}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in PARTS:
        raise ModelError(
            f"{folder}: model_type {printable(shortened(str(kind), 100))} is not read; expected {', '.join(PARTS)}"
        )
    heads = config.get("num_heads")
    known = {"heads": heads} if part.heads is None and kind == "transmil" and isinstance(heads, int) else {}
    averaged = {"logits": "mean"} if part.logits is None and kind == "dsmil" else {}
    return kind, part.model_copy(update={**known, **averaged})


def network_of(kind: str, part: AggregatorSpec, path: Path) -> tuple[Aggregator, tuple[str, ...]]:
    """Return the network of a kind whose weights are in a file, and notes on which parts of the file were used.

    Raises:
        ModelError: the file contains no such weights, or several.
    """
    if is_lightning(path):
        raise ModelError(f"{path}: {LIGHTNING}")
    made: list[tuple[str, Aggregator, tuple[str, ...]]] = []
    failed: list[tuple[int, ModelError]] = []
    for place, state in states_in(path, numbers=True):
        where = f"{path} ({place})" if place else str(path)
        found = 0
        try:
            layers, found = _layers(where, state, PARTS[kind])
            made.append((place, BUILDERS[kind](layers, part), layers.notes))
        except ModelError as error:
            failed.append((found, error))
    if not made:
        raise max(failed, key=lambda each: each[0])[1]
    if len({_weights_digest(network) for _, network, _ in made}) > 1:
        raise ModelError(
            f"{path}: has several fitting sets of weights, {' and '.join(p for p, _, _ in made[:2])}; save only one"
        )
    place, network, notes = made[0]
    return network, (*((f"the weights are {place!r} in {path.name}",) if place else ()), *notes)


def _layers(where: str, state: Mapping[str, Tensor], parts: Sequence[tuple[str, str]]) -> tuple[Layers, int]:
    """Return the layers of a state dict after the prefix that most of them share, and their number.

    Raises:
        ModelError: a name does not correspond to any part.
    """
    count = sum(tensor.numel() for tensor in state.values())
    if count > MAX_NUMBERS or len(state) > MAX_TENSORS:
        raise ModelError(f"{where}: claims {count:,} numbers in {len(state):,} tensors, more than any aggregator has")
    named = {_plain(name): (name, tensor) for name, tensor in state.items()}
    shared = Counter(".".join(name.split(".")[:k]) + "." * (k > 0) for name in named for k in range(MAX_PREFIX))
    prefixes = [prefix for prefix, _ in shared.most_common(MAX_PREFIXES)]
    counts = {prefix: sum(_part(name, prefix, parts) is not None for name in named) for prefix in prefixes}
    prefix = max(sorted(prefixes, key=len), key=lambda each: counts[each])
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    left: list[str] = []
    for plain, (name, tensor) in named.items():
        if (part := _part(plain, prefix, parts)) == "ignored" or not plain.startswith(prefix):
            left.append(name)
        elif part is None:
            raise ModelError(
                f"{where}: {printable(shortened(name, 200))} {tuple(tensor.shape)} does not belong to such a network; "
                "is the 'source:' the one that it was saved from?"
            )
        else:
            stem, kind = _stem(plain.removeprefix(prefix))
            found.setdefault(part, {}).setdefault(stem, {})[kind] = tensor
    notes = [f"the weights are those with the prefix {prefix!r}"] if prefix else []
    notes += [f"not used: {', '.join(left[:3])}{f' and {len(left) - 3} more' * (len(left) > 3)}"] if left else []
    ordered = {part: _ordered(where, stems, part, parts) for part, stems in found.items()}
    return Layers(where, ordered, tuple(notes)), counts[prefix]


def _plain(name: str) -> str:
    """Return a name without what wrappers (DataParallel, torch.compile) and CLAM insert between its parts."""
    return ".".join(part for part in WRAPPERS.sub("", name).split(".") if part != "module")


def _stem(name: str) -> tuple[str, str]:
    stem, _, kind = name.rpartition(".")
    return (stem, kind) if kind in ("weight", "bias") else (name, "weight")


def _part(name: str, prefix: str, parts: Sequence[tuple[str, str]]) -> str | None:
    if not name.startswith(prefix):
        return None
    stem, _ = _stem(name.removeprefix(prefix))
    return next((part for part, pattern in parts if re.fullmatch(pattern, stem)), None)


def _ordered(
    where: str, stems: Mapping[str, Mapping[str, Tensor]], part: str, parts: Sequence[tuple[str, str]]
) -> list[tuple[int, str, Tensor, Tensor | None]]:
    """Return the layers of a part in the order of their numbers, in float32."""
    patterns = [pattern for name, pattern in parts if name == part]
    layers = []
    for stem, tensors in stems.items():
        found = next(match for pattern in patterns if (match := re.fullmatch(pattern, stem)))
        number = next((int(group) for group in found.groups() if group), 0)
        if "weight" not in tensors or not all(tensor.is_floating_point() for tensor in tensors.values()):
            raise ModelError(f"{where}: {printable(stem)} has no real-valued weights")
        bias = tensors["bias"].float() if "bias" in tensors else None
        layers.append((number, stem, tensors["weight"].float(), bias))
    return sorted(layers, key=lambda layer: layer[0])


def _attention(layers: Layers, part: AggregatorSpec) -> Aggregator:
    """Return ABMIL or CLAM, which differ only in names."""
    layers.require("head", *(() if layers.count("plain") else ("gate_a", "score")))
    embed = layers.stack("embed")
    width = embed[-1].out_features if embed else None
    gate = None
    if layers.count("plain"):
        both = layers.stack("plain", width)
        if len(both) != 2:
            raise ModelError(f"{layers.where}: attention has {len(both)} layers, expected two (with tanh between them)")
        first, score = both
    else:
        first, score = layers.linear("gate_a", width), layers.linear("score")
        gate = layers.linear("gate_b", first.in_features) if layers.count("gate_b") else None
    if score.in_features != first.out_features or (gate is not None and gate.out_features != first.out_features):
        raise ModelError(
            f"{layers.where}: the attention layers do not fit each other: the first gives {first.out_features} "
            f"numbers{f', the gate {gate.out_features}' if gate else ''}, the last takes {score.in_features}"
        )
    pooled = score.out_features * first.in_features
    out = layers.stack("out", pooled)
    head = [*out, *_heads(layers, out[-1].out_features if out else pooled, score.out_features)]
    return AttentionPool(Mlp(embed, ends=True), first, gate, score, Mlp(head, ends=False))


def _heads(layers: Layers, inputs: int, branches: int) -> list[nn.Linear]:
    """Return the classifier's layers; if there is one for each branch, a single layer that combines them."""
    each = layers.parts["head"]
    single = len(each) > 1 and all(weight.ndim == 2 and len(weight) == 1 for _, _, weight, _ in each)
    if not single:
        return layers.stack("head", inputs)
    if len(each) != branches:
        raise ModelError(
            f"{layers.where}: {len(each)} classifiers ({each[0][1]}, ..), but attention has {branches} branches"
        )
    width = inputs // branches
    for _, name, weight, _ in each:
        if weight.shape[1] != width:
            raise layers.misfit(name, weight, f"(1, {width})")
    joined: Tensor = torch.block_diag(*(weight for _, _, weight, _ in each))  # type: ignore[no-untyped-call]
    biases = [torch.zeros(1) if bias is None else bias for _, _, _, bias in each]
    return [linear(joined, torch.cat(biases))]


def _dsmil(layers: Layers, part: AggregatorSpec) -> Aggregator:
    """Return DSMIL, as in its authors' code (three versions) or in MIL-Lab."""
    layers.require("instance", "query", "fcc")
    lab = bool(layers.count("head"))
    embed = layers.stack("embed" if lab else "lin")
    width = embed[-1].out_features if embed else None
    query = layers.stack("query", width)
    width = query[0].in_features
    value = layers.stack("value", width)
    instance = layers.linear("instance", width if lab else embed[0].in_features if embed else width)
    norm = layers.norm("norm", 0, value[-1].out_features if value else width) if layers.count("norm") else None
    head = layers.linear("head" if lab else "fcc", instance.out_features * (value[-1].out_features if value else width))
    if head.out_features != instance.out_features:
        raise ModelError(
            f"{layers.where}: {instance.out_features} logits per patch, but {head.out_features} for the bag"
        )
    numbered = bool(layers.parts["query"][0][1].rpartition(".")[2].isdecimal())  # nn.Sequential, which ends in tanh
    return Dsmil(
        Mlp(embed, ends=True),
        instance,
        Mlp(query, ends=False),
        Mlp(value, ends=bool(value) and _value_relu(layers, part, lab)),
        norm,
        head,
        of_embedded=lab,
        tanh=numbered,
        mean=part.logits == "mean",
    )


def _value_relu(layers: Layers, part: AggregatorSpec, lab: bool) -> bool:
    """Return whether a ReLU follows `v`: not in MIL-Lab or with `lin`, but with a query of two layers.

    Raises:
        ModelError: neither shows.
    """
    if part.value_activation is not None:
        return part.value_activation == "relu"
    if lab or layers.count("lin"):
        return False
    if layers.count("query") == 2:
        return True
    name = layers.parts["value"][0][1]
    raise ModelError(
        f"{layers.where}: {name}: DSMIL's code of 2021 puts no activation after it and that of 2022 a ReLU, and the "
        "weights do not tell which was used; add 'value_activation: none' or 'value_activation: relu' to 'aggregator:'"
    )


def _transmil(layers: Layers, part: AggregatorSpec) -> Aggregator:
    layers.require("embed", "token", "block_norm", "qkv", "joined", "ppeg", "norm", "head")
    embed = layers.stack("embed")
    width = embed[-1].out_features
    token = layers.parts["token"][0][2]
    if token.numel() != width:
        raise layers.misfit("cls_token", token, f"(1, 1, {width})", "data")
    blocks = [
        (layers.norm("block_norm", number, width), _nystrom(layers, part, number, width))
        for number, _, _, _ in layers.parts["block_norm"]
    ]
    convs = [_depthwise(layers, *layer[1:], width) for layer in layers.parts["ppeg"]]
    head = layers.linear("head", width)
    return TransMil(Mlp(embed, True), token, blocks, convs, layers.norm("norm", 0, width), Mlp([head], False))


def _nystrom(layers: Layers, part: AggregatorSpec, number: int, width: int) -> NystromAttention:
    _, name, weight, _ = layers.layer("qkv", number)
    _, out_name, out, out_bias = layers.layer("joined", number)
    inner = out.shape[-1]
    if weight.shape != (3 * inner, width):
        raise layers.misfit(name, weight, f"({3 * inner}, {width})")
    if out.shape != (width, inner):
        raise layers.misfit(out_name, out, f"({width}, {inner})")
    conv, heads = None, part.heads
    if layers.count("conv"):
        _, conv_name, kernel, _ = layers.layer("conv", number)
        if kernel.ndim != 4 or kernel.shape[1] != 1 or kernel.shape[3] != 1 or heads not in (None, len(kernel)):
            raise layers.misfit(conv_name, kernel, f"({heads or 'heads'}, 1, *, 1)")
        heads = len(kernel)
        conv = convolution(kernel, None)
    if heads is None or inner % heads:
        raise ModelError(
            f"{layers.where}: {name} gives {inner} numbers for all attention heads together, but not the number of "
            "heads; add 'heads: 8' (or another divisor) to 'aggregator:'"
        )
    return NystromAttention(linear(weight, None), linear(out, out_bias), conv, heads, part.landmarks or width // 2)


def _depthwise(layers: Layers, name: str, weight: Tensor, bias: Tensor | None, width: int) -> nn.Conv2d:
    if weight.ndim != 4 or weight.shape[:2] != (width, 1):
        raise layers.misfit(name, weight, f"({width}, 1, *, *)")
    return convolution(weight, bias)


BUILDERS = {"abmil": _attention, "clam": _attention, "dsmil": _dsmil, "transmil": _transmil}


def _weights_digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest(spec: SlideModelSpec, network: Aggregator, classes: Sequence[str], code: str) -> str:
    part = spec.aggregator
    options = part.model_dump(mode="json", exclude={"source", "weights", "sha256"}, exclude_none=True)
    source = part.kind if part.kind != "function" else part.source  # the location of a file does not matter
    about = [source, type(network).__name__, list(classes), spec.activation, options, code, _weights_digest(network)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()
