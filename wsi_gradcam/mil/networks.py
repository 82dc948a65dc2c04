"""The networks of slide-level models, from a bag of feature vectors to logits, and how relevance passes through them.

Those that pool by attention (ABMIL, CLAM, DSMIL) are one network with two parts, one for each patch and one for the
pooled whole, so that a bag of any size can be processed in chunks. The state dicts of published models are read by
`aggregators`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_gradcam.errors import ModelError, one_line, shortened

EPSILON = 1e-8  # LRP's epsilon, as in xMIL's code
PINV_STEPS = 6
TRIED = 7  # patches on which a user's module is tried


class BagOutput(NamedTuple):
    """What an aggregator returns for a bag: logits [K], and attention [N, H] or None if the network has none."""

    logits: Tensor
    attention: Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """A network's layers, whose gradient times input is relevance: plain, or by layer-wise relevance propagation.

    LRP is as in xMIL (Hense 2024, arXiv 2406.04280): attention and LayerNorm's deviation are constants, and through a
    linear layer y = z + b, z_k = sum_j w_kj x_j, R_j = sum_k w_kj x_j / (z_k + epsilon sign z_k) R_k (Bach 2015)
    passes. Nothing goes to biases: a layer's inputs get exactly what its outputs have. Outputs have the plain values
    whatever the rule.
    """

    lrp: bool = False

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Return a linear layer's outputs."""
        return self.biased(F.linear(x, layer.weight), layer.bias)

    def biased(self, z: Tensor, bias: Tensor | None) -> Tensor:
        """Return z + bias; in LRP, relevance passes only through z."""
        y = z if bias is None else z + bias
        if not self.lrp:
            return y
        return z * (y / (z + torch.where(z >= 0, EPSILON, -EPSILON))).detach()

    def fixed(self, x: Tensor) -> Tensor:
        """Return x; in LRP, a constant."""
        return x.detach() if self.lrp else x

    def norm(self, layer: nn.LayerNorm, x: Tensor) -> Tensor:
        """Return a LayerNorm's outputs; in LRP, the deviation is a constant, and the bias keeps its own relevance."""
        if not self.lrp:
            y: Tensor = layer(x)
            return y
        centred = x - x.mean(dim=-1, keepdim=True)
        deviation = (centred.square().mean(dim=-1, keepdim=True) + layer.eps).sqrt().detach()
        scaled = centred / deviation * layer.weight
        return scaled if layer.bias is None else scaled + layer.bias


PLAIN, LRP = Rule(), Rule(lrp=True)


class Mlp(nn.Module):
    """Linear layers with ReLUs between them, and after the last if `ends` is true; without layers, the identity.

    This is a class of its own rather than an nn.Sequential, so that a rule can be passed through it.
    """

    def __init__(self, layers: Sequence[nn.Linear], ends: bool, starts: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.starts, self.ends = starts, ends

    def forward(self, x: Tensor, rule: Rule = PLAIN) -> Tensor:
        """Return the outputs [..., d] of inputs [..., D]."""
        x = x.relu() if self.starts else x
        for k, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            x = rule.linear(layer, x)
            x = x.relu() if self.ends or k + 1 < len(self.layers) else x
        return x

    @property
    def width(self) -> int | None:
        """The length of an output; None without layers."""
        return int(self.layers[-1].out_features) if len(self.layers) else None  # type: ignore[arg-type]


class Aggregator(nn.Module):
    """A network from features [N, D] to a `BagOutput`. The N patches are in the slide's order, row by row.

    Attributes:
        feature_dim, class_count: D and K.
        attention_is: `scores`, which a softmax over the bag turns into weights; `weights` themselves; or None.
    """

    feature_dim: int
    class_count: int
    attention_is: Literal["scores", "weights"] | None = "scores"

    def forward(self, features: Tensor, rule: Rule = PLAIN) -> BagOutput:
        """Return logits [K] and attention [N, H] of one bag."""
        raise NotImplementedError


class Pooled(Aggregator):
    """An aggregator that is a function of the mean of patches' values, weighted by the softmax of their scores.

    The network may also look at critical patches: row m of `critical` [M, D] is the patch with the highest
    `critical_scores`[:, m].
    """

    critical_count = 0

    def critical_scores(self, features: Tensor) -> Tensor:
        """Return [n, M]; the largest in each column makes a patch critical. M is 0 for most networks."""
        return features.new_empty((len(features), 0))

    def instances(self, features: Tensor, critical: Tensor, rule: Rule = PLAIN) -> tuple[Tensor, Tensor]:
        """Return scores [n, H] and values [n, V] of patches, each on its own."""
        raise NotImplementedError

    def head(self, pooled: Tensor, critical: Tensor, rule: Rule = PLAIN) -> Tensor:
        """Return logits [..., K] from weighted means of values [..., H, V] and critical patches [..., M, D]."""
        raise NotImplementedError

    def summands(self) -> Tensor | None:
        """Return W [K, H, V] if the logits are W times the weighted means plus a constant; otherwise None."""
        return None

    def forward(self, features: Tensor, rule: Rule = PLAIN) -> BagOutput:
        """Return logits [K] and scores [N, H] for one bag."""
        chosen = self.critical_scores(features.detach()).argmax(dim=0)
        critical = features[chosen]
        scores, values = self.instances(features, critical, rule)
        weights = rule.fixed(scores.softmax(dim=0))
        return BagOutput(self.head(weights.T @ values, critical, rule), scores)


class Pool:
    """The mean of values weighted by the softmax of scores, as a stream; the largest score is kept separately.

    In this way, the mean without any one patch is exact too: without the largest it is what remains, and all others
    have a weight of at most a half.
    """

    def __init__(self) -> None:
        self.top = self.rest = self.total = torch.empty(0)
        self.top_value = self.rest_value = torch.empty(0)
        self.top_row = torch.empty(0, dtype=torch.long)

    def add(self, start: int, scores: Tensor, values: Tensor) -> None:
        """Add scores [n, H] and values [n, V] of the rows from `start` on."""
        scores, values = scores.detach().double().clone(), values.detach().double()
        best, at = scores.max(dim=0)
        if not self.top.numel():
            self._begin(scores, values)
        replaced = best > self.top
        columns = torch.arange(len(best), device=best.device)
        scores[at[replaced], columns[replaced]] = -torch.inf
        old = torch.where(replaced, self.top, -torch.inf)
        largest = torch.maximum(torch.maximum(self.rest, scores.max(dim=0).values), old)
        shift = torch.where(largest.isfinite(), largest, 0)
        kept, new, old = (self.rest - shift).exp(), (scores - shift).exp(), (old - shift).exp()
        self.total = self.total * kept + new.sum(dim=0) + old
        old_value = torch.where(old[:, None] > 0, old[:, None] * self.top_value, 0)
        self.rest_value = self.rest_value * kept[:, None] + new.T @ values + old_value
        self.rest = largest
        self.top = torch.where(replaced, best, self.top)
        self.top_row = torch.where(replaced, at + start, self.top_row)
        self.top_value = torch.where(replaced[:, None], values[at], self.top_value)

    def _begin(self, scores: Tensor, values: Tensor) -> None:
        heads, width = scores.shape[1], values.shape[1]
        self.top, self.rest = scores.new_full((heads,), -torch.inf), scores.new_full((heads,), -torch.inf)
        self.total, self.top_row = scores.new_zeros(heads), torch.full((heads,), -1, device=scores.device)
        self.top_value = self.rest_value = values.new_zeros(heads, width)

    @property
    def log_sum(self) -> Tensor:
        """The logarithm of the sum of the exponentials of all scores, [H]."""
        return self.top + torch.log1p((self.rest - self.top).exp() * self.total)

    @property
    def mean(self) -> Tensor:
        """The weighted mean [H, V] of all."""
        share = (self.rest - self.top).exp()
        return (self.top_value + share[:, None] * self.rest_value) / (1 + share * self.total)[:, None]

    @property
    def without_top(self) -> Tensor:
        """The weighted mean [H, V] of all but the one with the largest score; not finite if there is no other."""
        return self.rest_value / self.total[:, None]


class AttentionPool(Pooled):
    """Attention-based MIL (Ilse 2018, arXiv 1802.04712), CLAM with it (Lu 2021): z_h = sum_i softmax(s_h)_i v_i.

    v = embed(f); s = c(tanh(a(v))), gated c(tanh(a(v)) * sigmoid(b(v))); logits = head(z_1, .., z_H). CLAM_MB has a
    attention branch for each class, and its head sees each class's own z.
    """

    def __init__(self, embed: Mlp, a: nn.Linear, b: nn.Linear | None, c: nn.Linear, head: Mlp) -> None:
        super().__init__()
        self.embed, self.a, self.b, self.c, self.top = embed, a, b, c, head
        self.feature_dim = int(embed.layers[0].in_features if len(embed.layers) else a.in_features)  # type: ignore[arg-type]
        self.class_count = int(head.width or 0)

    def instances(self, features: Tensor, critical: Tensor, rule: Rule = PLAIN) -> tuple[Tensor, Tensor]:
        """Return scores [n, H] and values [n, V]."""
        values = self.embed(features, rule)
        hidden = self.a(values).tanh()
        if self.b is not None:
            hidden = hidden * self.b(values).sigmoid()
        return self.c(hidden), values

    def head(self, pooled: Tensor, critical: Tensor, rule: Rule = PLAIN) -> Tensor:
        """Return logits [..., K]."""
        logits: Tensor = self.top(pooled.flatten(-2), rule)
        return logits

    def summands(self) -> Tensor | None:
        """Return the head's weights [K, H, V] if it is one layer."""
        if len(self.top.layers) != 1:
            return None
        weight = self.top.layers[0].weight
        assert isinstance(weight, Tensor)
        return weight.detach().reshape(self.class_count, self.c.out_features, -1)


class Dsmil(Pooled):
    """Dual-stream MIL (Li 2021, arXiv 2011.08939): a branch of attention for each class, to its critical patch.

    u = embed(f); the critical patch of class k has the largest instance logit c_k = (instance u)_k, or that of f
    itself, as in the authors' code; s_ik = q(u_i) . q(u_m(k)) / sqrt(Q); z_k = sum_i softmax(s_k)_i v(u_i); the bag's
    logits are a linear layer of all z_k, and may be averaged with the critical patches' instance logits.
    """

    def __init__(
        self,
        embed: Mlp,
        instance: nn.Linear,
        query: Mlp,
        value: Mlp,
        norm: nn.LayerNorm | None,
        head: nn.Linear,
        *,
        of_embedded: bool,
        tanh: bool,
        mean: bool,
    ) -> None:
        super().__init__()
        self.embed, self.instance, self.query, self.value, self.norm, self.top = (
            embed,
            instance,
            query,
            value,
            norm,
            head,
        )
        self.of_embedded, self.tanh, self.mean = of_embedded, tanh, mean
        first = embed if len(embed.layers) else query
        self.feature_dim = int(first.layers[0].in_features)  # type: ignore[arg-type]
        self.class_count = self.critical_count = int(instance.out_features)

    def _queries(self, embedded: Tensor) -> Tensor:
        queries: Tensor = self.query(embedded)
        return queries.tanh() if self.tanh else queries

    def _instance(self, features: Tensor, rule: Rule = PLAIN) -> Tensor:
        return rule.linear(self.instance, self.embed(features, rule) if self.of_embedded else features)

    def critical_scores(self, features: Tensor) -> Tensor:
        """Return the instance logits [n, K]."""
        return self._instance(features)

    def instances(self, features: Tensor, critical: Tensor, rule: Rule = PLAIN) -> tuple[Tensor, Tensor]:
        """Return scores [n, K] and values [n, V]."""
        embedded = self.embed(features, rule)
        queries = self._queries(embedded)
        scores = queries @ self._queries(self.embed(critical)).T / math.sqrt(queries.shape[-1])
        return scores, self.value(embedded, rule)

    def head(self, pooled: Tensor, critical: Tensor, rule: Rule = PLAIN) -> Tensor:
        """Return logits [..., K]."""
        pooled = pooled if self.norm is None else rule.norm(self.norm, pooled)
        logits = rule.linear(self.top, pooled.flatten(-2))
        if not self.mean:
            return logits
        return (logits + self._instance(critical, rule).diagonal(dim1=-2, dim2=-1)) / 2

    def summands(self) -> Tensor | None:
        """Return the bag classifier's weights [K, K, V] if the logits come from it alone."""
        if self.norm is not None or self.mean:
            return None
        return self.top.weight.detach().reshape(self.class_count, self.class_count, -1)


class NystromAttention(nn.Module):
    """Self-attention by landmarks (Xiong 2021, arXiv 2102.03902): softmax(Q K~') softmax(Q~ K~')^+ softmax(Q~ K') V.

    Landmarks are means of equally many consecutive tokens, with zeros put before the first; the pseudo-inverse is
    computed iteratively (eq. 11). A convolution of V along the tokens, with one kernel per head, is added.
    """

    def __init__(self, qkv: nn.Linear, out: nn.Linear, conv: nn.Conv2d | None, heads: int, landmarks: int) -> None:
        super().__init__()
        self.qkv, self.out, self.conv, self.heads, self.landmarks = qkv, out, conv, heads, landmarks

    def forward(self, x: Tensor, rule: Rule = PLAIN) -> tuple[Tensor, Tensor]:
        """Return the outputs for tokens [n, d], and the weights [heads, n] with which the first token sees all."""
        count = len(x)
        before = -count % self.landmarks
        x = F.pad(x, (0, 0, before, 0))
        q, k, v = rule.linear(self.qkv, x).reshape(len(x), 3, self.heads, -1).permute(1, 2, 0, 3)
        q = q * q.shape[-1] ** -0.5
        few_q, few_k = (t.reshape(self.heads, self.landmarks, -1, t.shape[-1]).mean(dim=2) for t in (q, k))
        near = (q @ few_k.mT).softmax(dim=-1) @ pseudo_inverse((few_q @ few_k.mT).softmax(dim=-1))
        far = (few_q @ k.mT).softmax(dim=-1)
        near, far = rule.fixed(near), rule.fixed(far)
        mixed = near @ (far @ v)
        if self.conv is not None:
            mixed = mixed + self.conv(v[None])[0]
        y = rule.linear(self.out, mixed.transpose(0, 1).flatten(1))
        return y[before:], (near[:, before : before + 1] @ far)[:, 0, before:].detach()


def pseudo_inverse(a: Tensor) -> Tensor:
    """Return the pseudo-inverse of matrices [heads, m, m] by the iteration of Razavi (2014), six steps.

    Z_0 = A' / (|A|_1 |A|_inf), where the norms are the largest of all heads, then Z <- Z (13 I - A Z (15 I - A Z (7 I -
    A Z))) / 4.
    """
    z = a.mT / (a.abs().sum(dim=-2).max() * a.abs().sum(dim=-1).max())
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(PINV_STEPS):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


class TransMil(Aggregator):
    """TransMIL (Shao 2021, arXiv 2106.00908): Nystrom self-attention of all patches and a class token, with PPEG.

    h = relu(W f), made a square of side ceil(sqrt N) by repeating the first; a class token before it; a block h + A(LN
    h); PPEG, which adds depth-wise convolutions of 7, 5 and 3 over that square; more blocks; the logits are a linear
    layer of the class token. The square follows the order of patches, not their positions.
    """

    attention_is = "weights"

    def __init__(
        self,
        embed: Mlp,
        token: Tensor,
        blocks: Sequence[tuple[nn.LayerNorm, NystromAttention]],
        convs: Sequence[nn.Conv2d],
        norm: nn.LayerNorm,
        head: Mlp,
    ) -> None:
        super().__init__()
        self.embed, self.norm, self.top = embed, norm, head
        self.token = nn.Parameter(token)
        self.norms = nn.ModuleList(block[0] for block in blocks)
        self.attentions = nn.ModuleList(block[1] for block in blocks)
        self.convs = nn.ModuleList(convs)
        self.feature_dim = int(embed.layers[0].in_features)  # type: ignore[arg-type]
        self.class_count = int(head.width or 0)

    def forward(self, features: Tensor, rule: Rule = PLAIN) -> BagOutput:
        """Return logits [K], and the weights [N, heads] of the last block's class token."""
        count = len(features)
        side = math.ceil(math.sqrt(count))
        h = self.embed(features, rule)
        h = torch.cat([self.token.reshape(1, -1), h, h[: side * side - count]])
        seen = h
        for k, (norm, attention) in enumerate(zip(self.norms, self.attentions, strict=True)):
            assert isinstance(norm, nn.LayerNorm)
            more, seen = attention(rule.norm(norm, h), rule)
            h = h + more
            h = self._placed(h, side, rule) if k == 0 else h
        logits = self.top(rule.norm(self.norm, h[0]), rule)
        weights = seen[:, 1 : count + 1].clone()
        weights[:, : side * side - count] += seen[:, count + 1 :]  # a patch that occurs twice
        return BagOutput(logits, weights.T)

    def _placed(self, h: Tensor, side: int, rule: Rule) -> Tensor:
        square = h[1:].T.reshape(-1, side, side)
        without, bias = square, None
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            without = without + F.conv2d(square[None], conv.weight, None, 1, conv.padding, 1, conv.groups)[0]
            if conv.bias is not None:
                bias = conv.bias if bias is None else bias + conv.bias
        placed = rule.biased(without, None if bias is None else bias[:, None, None])
        return torch.cat([h[:1], placed.flatten(1).T])


class Opaque(Aggregator):
    """A user's program or module, of which only the answers are known."""

    attention_is = None

    def __init__(self, module: nn.Module, feature_dim: int, batched: bool, output: str | int | None) -> None:
        super().__init__()
        self.module, self.feature_dim, self.batched, self.output = module, feature_dim, batched, output

    def forward(self, features: Tensor, rule: Rule = PLAIN) -> BagOutput:
        """Return the logits [K]."""
        found = logits_of(self.module(features[None] if self.batched else features), self.output)
        return BagOutput(found.reshape(-1))


def logits_of(answer: Any, output: str | int | None) -> Tensor:
    """Return the logits among what a module returns.

    Raises:
        ModelError: it is unclear which they are, or they are not those of one bag.
    """
    if isinstance(answer, Tensor):
        found: Any = answer
    elif output is not None:
        try:
            found = answer[output]
        except (LookupError, TypeError) as error:
            raise ModelError(f"has no output {output!r}: {one_line(error)}") from error
    elif isinstance(answer, dict) and "logits" in answer:
        found = answer["logits"]
    elif hasattr(answer, "logits"):
        found = answer.logits
    else:
        raise ModelError(
            f"returns a {type(answer).__name__} of several outputs; choose the logits with 'output:' (a key, or a "
            "position counted from 0) in 'aggregator:'"
        )
    if not isinstance(found, Tensor) or found.numel() != found.shape[-1:].numel() or not found.ndim:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ModelError(f"gives {shape} for a bag, expected logits of shape (classes,) or (1, classes)")
    return found


def opaque(module: nn.Module, source: str, feature_dim: int | None, output: str | int | None) -> Aggregator:
    """Return a user's module as an aggregator, tried on a few patches.

    Raises:
        ModelError: it accepts bags neither as [N, D] nor as [1, N, D].
    """
    if isinstance(module, Aggregator):
        return module
    module = module.eval().float()
    widths = dict.fromkeys(int(each.shape[1]) for each in module.parameters() if each.ndim == 2)
    causes: list[str] = []
    for dim in [feature_dim] if feature_dim else list(widths):
        for batched in (False, True):
            candidate = Opaque(module, dim, batched, output)
            try:
                with torch.no_grad():
                    answer = candidate(torch.randn(TRIED, dim, generator=torch.Generator().manual_seed(0)))
                candidate.class_count = len(answer.logits)
                return candidate
            except Exception as error:  # the module's own code may raise anything
                causes.append(one_line(error))
    told = shortened(causes[0], 400) if causes else "no weight reveals the length of a feature vector"
    raise ModelError(
        f"{source} gives no logits for a bag of shape (patches, features): {told}; set 'feature_dim:' in 'aggregator:' "
        "to the length of a feature vector"
    )


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer with these weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias})}, assign=True)
    return layer


def convolution(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """Return the depth-wise convolution with these weights that keeps the size of its input."""
    channels, _, height, wide = weight.shape
    layer = nn.Conv2d(
        channels, channels, (height, wide), padding=(height // 2, wide // 2), groups=channels, bias=bias is not None
    )
    layer.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias})})
    return layer
