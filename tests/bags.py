"""Slide-level models for tests: state dicts as their authors' code names them, and what that code answers.

The answers are written from the papers on the state dicts' own names, in plain whole-bag form, beside and without the
package's networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from nystrom_attention import NystromAttention
from torch import Tensor
from torch.nn import functional as F

from wsi_gradcam.mil.aggregators import LoadedAggregator, load_aggregator
from wsi_gradcam.mil.networks import Aggregator
from wsi_gradcam.mil.spec import read_slide_model

D, V, Q, K = 12, 8, 6, 3  # features, values, attention, classes
State = dict[str, Tensor]
Answer = Callable[[State, Tensor], Tensor]


def layer(state: State, name: str, outputs: int, inputs: int, random: torch.Generator, bias: bool = True) -> None:
    """Put the weights of a linear layer into a state dict."""
    state[f"{name}.weight"] = torch.randn(outputs, inputs, generator=random) / math.sqrt(inputs)
    if bias:
        state[f"{name}.bias"] = torch.randn(outputs, generator=random) / 3


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """Return a linear layer's outputs."""
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def xmil(random: torch.Generator, layers: int = 1, outs: int = 0, bias: bool = True) -> State:
    """Return attention MIL as in xMIL."""
    state: State = {}
    for k in range(layers):
        layer(state, f"linear_layers.{k}.0", V, D if k == 0 else V, random, bias or k == 0)
    layer(state, "attention.0", Q, V if layers else D, random)
    layer(state, "attention.2", 1, Q, random)
    for k in range(outs):
        layer(state, f"out_layers.{k}.0", V, V, random, bias)
    layer(state, "classifier", K, V if layers else D, random, bias)
    return state


def xmil_answer(state: State, x: Tensor) -> Tensor:
    """Return the logits of attention MIL as in xMIL."""
    k = 0
    while f"linear_layers.{k}.0.weight" in state:
        x, k = linear(state, f"linear_layers.{k}.0", x).relu(), k + 1
    weights = linear(state, "attention.2", linear(state, "attention.0", x).tanh()).softmax(dim=0)
    z, k = (weights * x).sum(dim=0), 0
    while f"out_layers.{k}.0.weight" in state:
        z, k = linear(state, f"out_layers.{k}.0", z).relu(), k + 1
    return linear(state, "classifier", z)


def clam(
    random: torch.Generator, branches: int, gated: bool = True, dropout: bool = True, legacy: bool = False
) -> State:
    """Return CLAM_SB, or CLAM_MB of as many branches as classes; `legacy` as several GPUs saved it."""
    state: State = {}
    net = "attention_net.module" if legacy else "attention_net"
    place = 3 if dropout else 2
    layer(state, f"{net}.0", V, D, random)
    if gated:
        layer(state, f"{net}.{place}.attention_a.0", Q, V, random)
        layer(state, f"{net}.{place}.attention_b.0", Q, V, random)
        layer(state, f"{net}.{place}.attention_c", branches, Q, random)
    else:
        layer(state, f"{net}.{place}.module.0", Q, V, random)
        layer(state, f"{net}.{place}.module.{place}", branches, Q, random)
    if branches == 1:
        layer(state, "classifiers", K, V, random)
    for k in range(K):
        if branches > 1:
            layer(state, f"classifiers.{k}", 1, V, random)
        layer(state, f"instance_classifiers.{k}", 2, V, random)
    state["instance_loss_fn.labels"] = torch.arange(2)
    return state


def clam_answer(state: State, x: Tensor) -> Tensor:
    """Return the logits of CLAM."""
    state = {name.replace("attention_net.module.", "attention_net."): value for name, value in state.items()}
    h = linear(state, "attention_net.0", x).relu()
    place = 3 if any(name.startswith("attention_net.3.") for name in state) else 2
    net = f"attention_net.{place}"
    if f"{net}.attention_c.weight" in state:
        gated = linear(state, f"{net}.attention_a.0", h).tanh() * linear(state, f"{net}.attention_b.0", h).sigmoid()
        scores = linear(state, f"{net}.attention_c", gated)
    else:
        scores = linear(state, f"{net}.module.{place}", linear(state, f"{net}.module.0", h).tanh())
    m = scores.softmax(dim=0).T @ h
    if len(m) == 1:
        return linear(state, "classifiers", m[0])
    return torch.cat([linear(state, f"classifiers.{k}", m[k]) for k in range(K)])


def lab_abmil(random: torch.Generator) -> State:
    """Return MIL-Lab's ABMIL with two layers before attention, as its wrapper saves it."""
    state: State = {}
    layer(state, "model.patch_embed.0", V, D, random)
    layer(state, "model.patch_embed.3", V, V, random)
    for gate in "ab":
        layer(state, f"model.global_attn.attention_{gate}.0", Q, V, random)
    layer(state, "model.global_attn.attention_c", 1, Q, random)
    layer(state, "model.classifier", K, V, random)
    return state


def lab_abmil_answer(state: State, x: Tensor) -> Tensor:
    """Return the logits of MIL-Lab's ABMIL."""
    for k in (0, 3):
        x = linear(state, f"model.patch_embed.{k}", x).relu()
    a, b = (linear(state, f"model.global_attn.attention_{gate}.0", x) for gate in "ab")
    weights = linear(state, "model.global_attn.attention_c", a.tanh() * b.sigmoid()).softmax(dim=0)
    return linear(state, "model.classifier", (weights * x).sum(dim=0))


def dsmil(random: torch.Generator, value: bool = False, lin: bool = False) -> State:
    """Return DSMIL as its authors' code of 2022 names it, or with `lin` as that of half a year before."""
    state: State = {}
    layer(state, "i_classifier.fc.0", K, D, random)
    if lin:
        layer(state, "b_classifier.lin.0", D, D, random)
    layer(state, "b_classifier.q.0", Q, D, random)
    if not lin:
        layer(state, "b_classifier.q.2", Q, Q, random)
    if value or lin:
        layer(state, "b_classifier.v.1", D, D, random)
    state["b_classifier.fcc.weight"] = torch.randn(K, K, D, generator=random) / 4
    state["b_classifier.fcc.bias"] = torch.randn(K, generator=random)
    return state


def dsmil_answer(state: State, x: Tensor) -> Tensor:
    """Return the bag's logits of DSMIL."""
    classes = linear(state, "i_classifier.fc.0", x)
    lin = "b_classifier.lin.0.weight" in state
    x = linear(state, "b_classifier.lin.0", x).relu() if lin else x

    def query(of: Tensor) -> Tensor:
        q = linear(state, "b_classifier.q.0", of)
        return q.tanh() if lin else linear(state, "b_classifier.q.2", q.relu()).tanh()

    v = linear(state, "b_classifier.v.1", x) if "b_classifier.v.1.weight" in state else x
    v = v.relu() if "b_classifier.v.1.weight" in state and not lin else v
    critical = query(x[classes.argmax(dim=0)])
    weights = (query(x) @ critical.T / math.sqrt(Q)).softmax(dim=0)
    return F.conv1d((weights.T @ v)[None], state["b_classifier.fcc.weight"], state["b_classifier.fcc.bias"]).flatten()


def lab_dsmil(random: torch.Generator) -> State:
    """Return MIL-Lab's DSMIL, which has a classifier that is never used, a norm, and averages two answers."""
    state: State = {}
    layer(state, "patch_embed.0", V, D, random)
    layer(state, "i_classifier.inst_classifier", K, V, random)
    layer(state, "b_classifier.q", Q, V, random)
    layer(state, "b_classifier.v.1", V, V, random)
    state["b_classifier.norm.weight"] = 1 + torch.randn(V, generator=random) / 3
    state["b_classifier.norm.bias"] = torch.randn(V, generator=random) / 3
    state["b_classifier.fcc.weight"] = torch.randn(3, 3, V, generator=random)
    state["b_classifier.fcc.bias"] = torch.randn(3, generator=random)
    state["classifier.weight"] = torch.randn(K, K, V, generator=random) / 4
    state["classifier.bias"] = torch.randn(K, generator=random)
    return state


def lab_dsmil_answer(state: State, x: Tensor) -> Tensor:
    """Return the logits of MIL-Lab's DSMIL."""
    u = linear(state, "patch_embed.0", x).relu()
    classes = linear(state, "i_classifier.inst_classifier", u)
    q, v = linear(state, "b_classifier.q", u), linear(state, "b_classifier.v.1", u)
    weights = (q @ q[classes.argmax(dim=0)].T / math.sqrt(Q)).softmax(dim=0)
    b = F.layer_norm(weights.T @ v, (V,), state["b_classifier.norm.weight"], state["b_classifier.norm.bias"])
    bag = F.conv1d(b[None], state["classifier.weight"], state["classifier.bias"]).flatten()
    return (bag + classes.max(dim=0).values) / 2


def transmil(random: torch.Generator, lab: bool = False) -> State:
    """Return TransMIL of 8 numbers a token, 2 heads and 4 landmarks, in its authors' names or MIL-Lab's."""
    state: State = {}
    first, last, attention = ("patch_embed.0", "classifier", "attention") if lab else ("_fc1.0", "_fc2", "attn")
    layer(state, first, V, D, random)
    state["cls_token"] = torch.randn(1, 1, V, generator=random)
    for name, size in {"proj": 7, "proj1": 5, "proj2": 3}.items():
        state[f"pos_layer.{name}.weight"] = torch.randn(V, 1, size, size, generator=random) / size
        state[f"pos_layer.{name}.bias"] = torch.randn(V, generator=random) / 3
    for k in range(2):
        block = f"blocks.{k}" if lab else f"layer{k + 1}"
        state[f"{block}.norm.weight"] = 1 + torch.randn(V, generator=random) / 3
        state[f"{block}.norm.bias"] = torch.randn(V, generator=random) / 3
        layer(state, f"{block}.{attention}.to_qkv", 3 * V, V, random, bias=False)
        layer(state, f"{block}.{attention}.to_out.0", V, V, random)
        state[f"{block}.{attention}.res_conv.weight"] = torch.randn(2, 1, 33, 1, generator=random) / 4
    state["norm.weight"], state["norm.bias"] = torch.ones(V), torch.zeros(V)
    layer(state, last, K, V, random)
    return state


def transmil_answer(state: State, x: Tensor) -> Tensor:
    """Return the logits of TransMIL, with the attention of the package that its authors use."""
    lab = "classifier.weight" in state
    h = linear(state, "patch_embed.0" if lab else "_fc1.0", x).relu()
    side = math.ceil(math.sqrt(len(h)))
    h = torch.cat([state["cls_token"][0], h, h[: side**2 - len(h)]])
    for k in range(2):
        block = f"blocks.{k}" if lab else f"layer{k + 1}"
        attention = NystromAttention(V, V // 2, 2, V // 2, 6, True).to(h.dtype).eval()
        names = f"{block}.{'attention' if lab else 'attn'}."
        attention.load_state_dict({n.removeprefix(names): v for n, v in state.items() if n.startswith(names)})
        normed = F.layer_norm(h, (V,), state[f"{block}.norm.weight"], state[f"{block}.norm.bias"])
        h = h + attention(normed[None])[0]
        if k == 0:
            square = h[1:].T.reshape(1, V, side, side)
            placed = square + sum(
                F.conv2d(square, state[f"pos_layer.{n}.weight"], state[f"pos_layer.{n}.bias"], 1, size // 2, 1, V)
                for n, size in {"proj": 7, "proj1": 5, "proj2": 3}.items()
            )
            h = torch.cat([h[:1], placed[0].flatten(1).T])
    last = F.layer_norm(h[0], (V,), state["norm.weight"], state["norm.bias"])
    return linear(state, "classifier" if lab else "_fc2", last)


def seeded(seed: int = 0) -> torch.Generator:
    """Return a source of random numbers."""
    return torch.Generator().manual_seed(seed)


# Name: kind of source, state dict, answers.
MODELS: dict[str, tuple[str, State, Answer]] = {
    "abmil": ("abmil", xmil(seeded()), xmil_answer),
    "abmil of no first layer": ("abmil", xmil(seeded(), layers=0), xmil_answer),
    "abmil without biases, three layers": ("abmil", xmil(seeded(), layers=3, bias=False), xmil_answer),
    "abmil with a layer behind the pooling": ("abmil", xmil(seeded(), outs=1), xmil_answer),
    "abmil of MIL-Lab": ("abmil", lab_abmil(seeded()), lab_abmil_answer),
    "clam_sb": ("clam", clam(seeded(), 1), clam_answer),
    "clam_sb, no gate, no dropout": ("clam", clam(seeded(), 1, gated=False, dropout=False), clam_answer),
    "clam_sb, no gate, of several GPUs": ("clam", clam(seeded(), 1, gated=False, legacy=True), clam_answer),
    "clam_mb": ("clam", clam(seeded(), K), clam_answer),
    "clam_mb of several GPUs, no dropout": ("clam", clam(seeded(), K, dropout=False, legacy=True), clam_answer),
    "dsmil": ("dsmil", dsmil(seeded()), dsmil_answer),
    "dsmil with values": ("dsmil", dsmil(seeded(), value=True), dsmil_answer),
    "dsmil with lin": ("dsmil", dsmil(seeded(), lin=True), dsmil_answer),
    "dsmil of MIL-Lab": ("dsmil: mean", lab_dsmil(seeded()), lab_dsmil_answer),
    "transmil": ("transmil", transmil(seeded()), transmil_answer),
    "transmil of MIL-Lab": ("transmil", transmil(seeded(), lab=True), transmil_answer),
}


def write_model(folder: Path, kind: str, state: State, **more: str) -> Path:
    """Write weights and the file of a slide-level model that names them."""
    torch.save(state, folder / "weights.pt")
    source, _, logits = kind.partition(": ")
    lines = [f"source: {source}", "weights: weights.pt", *([f"logits: {logits}"] if logits else [])]
    text = "aggregator:\n" + "".join(f"  {line}\n" for line in lines) + "".join(f"{k}: {v}\n" for k, v in more.items())
    (folder / "slide.yaml").write_text(text, encoding="utf-8")
    return folder / "slide.yaml"


def loaded(folder: Path, name: str) -> LoadedAggregator:
    """Return one of `MODELS` as it is loaded from a file."""
    kind, state, _ = MODELS[name]
    return load_aggregator(read_slide_model(write_model(folder, kind, state)))


def in_double(folder: Path, name: str) -> tuple[Aggregator, Callable[[Tensor], Tensor]]:
    """Return one of `MODELS`, in float64, and the function of bags that it should be."""
    _, state, answer = MODELS[name]
    exact = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}
    return loaded(folder, name).network.double(), lambda x: answer(exact, x)


def bag(count: int, seed: int = 0, width: int = D) -> NDArray[np.float64]:
    """Return features [count, width]."""
    return np.random.default_rng(seed).normal(size=(count, width))
