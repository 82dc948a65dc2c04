"""`explain_bag`: each patch's contribution to the slide's logits, by several methods at once.

Bags may be larger than memory. Networks that pool by attention are processed in chunks: a first pass pools scores and
values as a stream, the gradient of the logits with respect to the pooled values z_h is that of the head alone, and a
second pass takes the vector-Jacobian product of each chunk with what is then known,

    ds/dv_i = sum_h p_ih ds/dz_h,    ds/dscore_ih = p_ih <ds/dz_h, v_i - z_h>,    p = softmax(scores),

which is the gradient of the whole bag. Other networks see a bag at once, and are refused if there is not enough memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from wsi_gradcam.cam.targets import score_of_bag
from wsi_gradcam.errors import ConfigError, ModelError, did_you_mean
from wsi_gradcam.mil.networks import LRP, PLAIN, Aggregator, AttentionPool, Mlp, Opaque, Pool, Pooled, Rule
from wsi_gradcam.mil.spec import BAG_METHODS, CHAINED, BagExplanation, refuse_large_bag, whole_bag_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.cam.targets import Target

METHODS = (*BAG_METHODS, "single", "attention")
STEPS = 32  # points of integrated gradients, by Gauss and Legendre
CHUNK_BYTES = 96 << 20
PATH_BYTES = 3 * CHUNK_BYTES  # for a bag whose path is followed point by point, by the gradient of the whole
MAX_ROWS, MIN_ROWS = 4096, 16
MEASURED = (512, 1024, 2048)  # patches of the bags that show how memory grows
Coefficients = Callable[[str, int, "NDArray[np.floating]"], None]


def explain_bag(
    aggregator: Aggregator,
    features: Any,
    targets: Sequence[Target],
    methods: Sequence[str],
    *,
    baseline: NDArray[np.floating] | None = None,
    coefficients: Coefficients | None = None,
    steps: int = STEPS,
) -> BagExplanation:
    """Return logits, attention, and the relevance of each patch for each target by each method.

    Args:
        features: [N, D], float16 or float32; an array, or an object that returns one for a slice of rows (Zarr, HDF5,
            memmap).
        methods: from `METHODS`; `attention` has no relevance and is in `attention`.
        baseline: [D], where the path of integrated gradients begins; zero unless given.
        coefficients: called with method, first row and c [n, T, D] for the rows from there on, in order, for each of
            the methods of `CHAINED`.
        steps: points on the path of integrated gradients.

    Raises:
        ConfigError: a method does not exist, or this aggregator does not have it.
        ModelError: the features do not fit the aggregator, are not finite, or need more memory than there is.
    """
    _check(aggregator, features, methods, baseline)
    base = np.zeros(aggregator.feature_dim) if baseline is None else np.asarray(baseline)
    kind = _PooledBag if isinstance(aggregator, Pooled) else _WholeBag
    with torch.enable_grad():
        return kind(aggregator, features, targets, tuple(methods), base, coefficients, steps).explain()


def memory_needed(aggregator: Aggregator, count: int, targets: int = 1) -> int:
    """Return the approximate peak memory for explaining a bag of `count` patches, in bytes.

    In chunks, this is the memory of a chunk and a few numbers for each patch; otherwise, it is what autograd keeps for
    three small bags, extrapolated by a square.
    """
    one = next(iter(aggregator.parameters()), torch.zeros(()))  # a user's module may have none
    if isinstance(aggregator, Pooled):
        heads = aggregator(one.new_zeros(1, aggregator.feature_dim)).attention
        return 4 * CHUNK_BYTES + count * 8 * (2 * (1 if heads is None else heads.shape[1]) + 6 * targets)
    return whole_bag_bytes(memory_growth(aggregator), count, aggregator.feature_dim, targets, one.element_size())


def memory_growth(aggregator: Aggregator) -> tuple[float, ...]:
    """Return autograd's bytes for a bag as a polynomial of its patches, see `BagFacts.whole`; () if in chunks."""
    if isinstance(aggregator, Pooled):
        return ()
    one = next(iter(aggregator.parameters()), torch.zeros(()))
    kept = [_kept(aggregator, one.new_zeros(n, aggregator.feature_dim)) for n in MEASURED]
    return tuple(float(1.5 * value) for value in np.polyfit(MEASURED, kept, 2))


def _kept(aggregator: Aggregator, bag: Tensor) -> int:
    """Return the bytes that autograd keeps for a bag until the backward pass."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # an output that is held by its own graph would never be freed

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep = aggregator(bag.requires_grad_())
    del keep
    return sum(seen.values())


def _check(aggregator: Aggregator, features: Any, methods: Sequence[str], baseline: Any) -> None:
    check_methods(aggregator, methods)
    dim, shape = aggregator.feature_dim, tuple(features.shape)
    if len(shape) != 2 or shape[1] != dim:
        raise ModelError(
            f"features of shape {shape}, but the aggregator takes (patches, {dim}); were they made by another encoder "
            "than the one that it was trained with?"
        )
    if not shape[0]:
        raise ModelError("a bag without patches has no answer; is there tissue on the slide?")
    if baseline is not None and np.shape(baseline) != (dim,):
        raise ModelError(f"a baseline of shape {np.shape(baseline)}, expected ({dim},)")


def check_methods(aggregator: Aggregator, methods: Sequence[str]) -> None:
    """Raise ConfigError for an unknown bag method, or one that the aggregator does not have."""
    for method in methods:
        if method not in METHODS:
            near = did_you_mean(method, METHODS)
            raise ConfigError(f"bag method {method!r}: expected {', '.join(METHODS)}{near and f'; {near}'}")
    if "attention" in methods and aggregator.attention_is is None:
        raise ConfigError(
            "attention: this aggregator is custom code, so its attention is not known; leave attention out"
        )
    if "lrp" in methods and isinstance(aggregator, Opaque):
        raise ConfigError("lrp: its rules are known for abmil, clam, dsmil and transmil; use integrated_gradients")
    if "shapley" in methods and (not isinstance(aggregator, Pooled) or aggregator.summands() is None):
        raise ConfigError(
            "shapley: this aggregator is not additive in its patches (a layer follows the pooling, or patches attend "
            "to each other); use one_removed or integrated_gradients"
        )


@dataclass
class _Bag:
    """A bag that is being explained: its features, the request, and the results so far."""

    network: Aggregator
    features: Any
    targets: Sequence[Target]
    methods: tuple[str, ...]
    baseline_at: NDArray[np.floating]
    coefficients: Coefficients | None
    steps: int

    def __post_init__(self) -> None:
        parameter = next(iter(self.network.parameters()), torch.zeros(()))
        self.dtype, self.device = parameter.dtype, parameter.device
        self.numpy_dtype = np.float64 if self.dtype == torch.float64 else np.float32
        self.baseline = self.tensor(self.baseline_at)
        nodes, weights = np.polynomial.legendre.leggauss(self.steps)
        self.path = [(float(a + 1) / 2, float(w) / 2) for a, w in zip(nodes, weights, strict=True)]
        sizes, self.scores = (len(self.features), len(self.targets)), list[Any]()
        self.relevance = {method: np.empty(sizes) for method in self.methods if method != "attention"}

    def tensor(self, values: Any) -> Tensor:
        """Return values in the form that the network takes."""
        return torch.from_numpy(np.array(values, self.numpy_dtype)).to(self.device)

    def block(self, start: int, stop: int) -> Tensor:
        """Return the features of rows from `start` to `stop`.

        Raises:
            ModelError: one of them is not finite.
        """
        block = self.tensor(self.features[start:stop])
        if not bool(torch.isfinite(block).all()):
            row = start + int((~torch.isfinite(block)).any(dim=1).nonzero()[0])
            raise ModelError(f"the feature vector of patch {row} is not finite; encode it again")
        return block

    def keep(self, method: str, start: int, factors: Tensor, coefficients: Tensor) -> None:
        """Record the coefficients [n, T, D] of rows, and their products with `factors` [n, D]."""
        stop = start + len(factors)
        products = torch.einsum("ntd,nd->nt", coefficients.double(), factors.double())
        self.relevance[method][start:stop] = products.cpu().numpy()
        if self.coefficients is not None:
            self.coefficients(method, start, coefficients.cpu().numpy())

    def _explain_path(self, bag: Tensor) -> None:
        """Explain a bag that is in memory along the path from the baseline."""
        change, total = bag - self.baseline, torch.zeros(())
        for at, weight in self.path:
            total = total + weight * self._gradients(self.baseline + at * change, PLAIN)
        self._chain("integrated_gradients", change, total)

    def _gradients(self, bag: Tensor, rule: Rule) -> Tensor:
        """Return the gradients [N, T, D] of all targets at a bag."""
        bag = bag.clone().requires_grad_()
        logits = self.network(bag, rule).logits
        found = [torch.autograd.grad(score(logits[None])[0], bag, retain_graph=True)[0] for score in self.scores]
        return torch.stack(found, dim=1) if found else bag.new_zeros(len(bag), 0, bag.shape[1])

    def _chain(self, method: str, factors: Tensor, coefficients: Tensor) -> None:
        for start in range(0, len(factors), MAX_ROWS):
            self.keep(method, start, factors[start : start + MAX_ROWS], coefficients[start : start + MAX_ROWS])


@dataclass
class _Point:
    """A bag on the path from the baseline (0) to its actual features (1), and what was found for it."""

    at: float
    weight: float = 1.0
    rule: Rule = PLAIN
    critical: Tensor = field(default_factory=lambda: torch.empty(0))
    chosen: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    pool: Pool = field(default_factory=Pool)
    by_pooled: list[Tensor] = field(default_factory=list)  # ds/dz [H, V] of each target
    by_critical: list[Tensor] = field(default_factory=list)  # ds/d critical [M, D]


class _Lifted:
    """The features of a bag after a linear layer, computed on demand."""

    def __init__(self, bag: _Bag, layer: nn.Linear) -> None:
        self.bag, self.layer, self.shape = bag, layer, (len(bag.features), layer.out_features)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> NDArray[np.floating]:
        with torch.no_grad():
            found: NDArray[np.floating] = self.layer(self.bag.block(rows.start, rows.stop)).cpu().numpy()
        return found


class _PooledBag(_Bag):
    """A bag for a network that pools by attention, in chunks."""

    network: Pooled

    def explain(self) -> BagExplanation:
        """Return the explanation."""
        self.head = copy.deepcopy(self.network).double()  # what is left without one of 200,000 is in the last digits
        self.rows = self._rows()
        whole = _Point(1.0)
        walked = "integrated_gradients" in self.methods and not self._explain_lifted()
        at_once = len(self.features) * self.row_bytes <= PATH_BYTES  # each point is then seen once, not twice
        gradients = [_Point(a, w) for a, w in self.path] if walked and not at_once else []
        self.raw: list[Tensor] = []
        self._pool([whole, *gradients])
        self.logits = self._logits(whole.pool.mean, whole.critical)
        self.scores = [score_of_bag(target, self.logits) for target in self.targets]
        if walked and at_once:
            self._explain_path(self.block(0, len(self.features)))
        for point in [whole, *gradients]:
            self._differentiate(point)
        self._differentiate_critical([*([whole] if "gradient_x_input" in self.methods else []), *gradients])
        relevant = _Point(1.0, 1.0, LRP, whole.critical, whole.chosen, whole.pool)
        self._differentiate(relevant)
        for start, block in self._blocks():
            self._explain(start, block, whole, gradients, relevant)
        if "one_removed" in self.methods:
            self._remove_critical(whole)
        raw = torch.cat(self.raw)
        known = {"attention": raw, "attention_weight": (raw - whole.pool.log_sum).exp()}
        attention = {name: values.cpu().numpy() for name, values in known.items()}
        return BagExplanation(self.logits.cpu().numpy(), attention, self.relevance)

    def _explain_lifted(self) -> bool:
        """Explain along the path after a first linear layer, if there is one: it is straight there, and narrower."""
        network = self.network
        if not isinstance(network, AttentionPool) or network.embed.starts or not len(network.embed.layers):
            return False
        first, *rest = (layer for layer in network.embed.layers if isinstance(layer, nn.Linear))
        tail = AttentionPool(Mlp(rest, True, starts=True), network.a, network.b, network.c, network.top)
        given, weight = self.coefficients, first.weight.cpu().numpy()

        def take(method: str, start: int, block: NDArray[np.floating]) -> None:
            if given is not None:
                given(method, start, block @ weight)

        start, ours = first(self.baseline).detach().cpu().numpy(), ("integrated_gradients",)
        behind = _PooledBag(tail, _Lifted(self, first), self.targets, ours, start, take, len(self.path))
        self.relevance |= behind.explain().relevance
        return True

    def _rows(self) -> int:
        """Return the number of patches in a chunk of about `CHUNK_BYTES`."""
        with torch.no_grad():
            none = self.baseline.new_zeros(self.network.critical_count, len(self.baseline))
            scores, values = self.network.instances(self.baseline[None], none)
        layers = sum(parameter.shape[0] for parameter in self.network.parameters() if parameter.ndim == 2)
        pooled = scores.shape[1] * values.shape[1] * 2 * 3 * bool({"single", "one_removed"} & set(self.methods))
        dim = self.network.feature_dim
        chained = dim * len(self.targets) * 2 * len(set(CHAINED) & set(self.methods))
        self.row_bytes = 4 * (4 * dim + 4 * layers + pooled + chained)
        return max(MIN_ROWS, min(MAX_ROWS, CHUNK_BYTES // self.row_bytes))

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(self.features), self.rows):
            yield start, self.block(start, start + self.rows)

    def _along(self, block: Tensor, point: _Point) -> Tensor:
        return block if point.at == 1 else self.baseline + point.at * (block - self.baseline)

    def _pool(self, points: list[_Point], without: int | None = None) -> None:
        """Find critical patches and weighted means of points, for the whole bag or `without` a row."""
        with torch.no_grad():
            if self.network.critical_count:
                self._choose(points, without)
            for start, block in self._blocks():
                for point in points:
                    moved = self._along(block, point)
                    scores, values = self.network.instances(moved, point.critical.to(self.dtype))
                    if point.at == 1 and without is None:
                        self.raw.append(scores.double())
                    if without is not None and start <= without < start + len(block):
                        scores = scores.clone()
                        scores[without - start] = -torch.inf
                    point.pool.add(start, scores, values)

    def _choose(self, points: list[_Point], without: int | None) -> None:
        """Find the patches with the largest critical scores."""
        count = self.network.critical_count
        best = [self.baseline.new_full((count,), -torch.inf) for _ in points]
        for point in points:
            point.critical = self.baseline.new_zeros(count, self.network.feature_dim)
            point.chosen = torch.full((count,), -1, device=self.device)
        for start, block in self._blocks():
            for k, point in enumerate(points):
                moved = self._along(block, point)
                scores = self.network.critical_scores(moved)
                if without is not None and start <= without < start + len(block):
                    scores[without - start] = -torch.inf
                top, at = scores.max(dim=0)
                better = top > best[k]
                best[k] = torch.where(better, top, best[k])
                point.chosen = torch.where(better, at + start, point.chosen)
                point.critical = torch.where(better[:, None], moved[at], point.critical)

    def _logits(self, pooled: Tensor, critical: Tensor, rule: Rule = PLAIN) -> Tensor:
        return self.head.head(pooled.double(), critical.double(), rule)

    def _differentiate(self, point: _Point) -> None:
        """Find ds/dz and ds/d critical, as far as the head goes."""
        pooled = point.pool.mean.clone().requires_grad_()
        critical = point.critical.double().clone().requires_grad_()
        logits = self._logits(pooled, critical, point.rule)
        for score in self.scores:
            found = torch.autograd.grad(
                score(logits[None])[0], (pooled, critical), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            point.by_pooled.append(found[0])
            point.by_critical.append(found[1])

    def _differentiate_critical(self, points: list[_Point]) -> None:
        """Add to ds/d critical what passes through the scores of all patches."""
        for _, block in self._blocks() if self.network.critical_count and points else ():
            for point in points:
                critical = point.critical.clone().requires_grad_()
                scores, values = self.network.instances(self._along(block, point), critical)
                for t, (_, by_score) in enumerate(self._cotangents(point, scores, values)):
                    (found,) = torch.autograd.grad(scores, critical, by_score, retain_graph=True)
                    point.by_critical[t] += found.double()

    def _cotangents(self, point: _Point, scores: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ds/dvalues [n, V] and ds/dscores [n, H] for each target."""
        weights = (scores.detach().double() - point.pool.log_sum).exp().to(self.dtype)
        for by_pooled in point.by_pooled:
            narrow, mean = by_pooled.to(self.dtype), (by_pooled * point.pool.mean).sum(dim=1).to(self.dtype)
            yield weights @ narrow, weights * (values.detach() @ narrow.T - mean)

    def _pull(self, start: int, block: Tensor, point: _Point) -> tuple[Tensor, Tensor, Tensor]:
        """Return coefficients [n, T, D], and the scores and values of the patches."""
        moved = self._along(block, point).clone().requires_grad_()
        scores, values = self.network.instances(moved, point.critical.to(self.dtype), point.rule)
        found = []
        for by_value, by_score in self._cotangents(point, scores, values):
            outputs = [(values, by_value)] if point.rule.lrp else [(values, by_value), (scores, by_score)]
            (gradient,) = torch.autograd.grad(
                [output for output, _ in outputs], moved, [given for _, given in outputs], retain_graph=True
            )
            found.append(gradient)
        pulled = torch.stack(found, dim=1) if found else moved.new_zeros(len(moved), 0, moved.shape[1])
        for m, row in enumerate(point.chosen.tolist()):
            if start <= row < start + len(block):
                for t, by_critical in enumerate(point.by_critical):
                    pulled[row - start, t] += by_critical[m].to(self.dtype)
        return pulled, scores.detach(), values.detach()

    def _explain(self, start: int, block: Tensor, whole: _Point, path: list[_Point], relevant: _Point) -> None:
        """Compute everything that is requested for a chunk."""
        if "gradient_x_input" in self.methods:
            pulled, scores, values = self._pull(start, block, whole)
            self.keep("gradient_x_input", start, block, pulled)
        else:
            with torch.no_grad():
                scores, values = self.network.instances(block, whole.critical.to(self.dtype))
        if "lrp" in self.methods:
            self.keep("lrp", start, block, self._pull(start, block, relevant)[0])
        if path:
            total = block.new_zeros(len(block), len(self.targets), block.shape[1])
            for point in path:
                total += point.weight * self._pull(start, block, point)[0]
            self.keep("integrated_gradients", start, block - self.baseline, total)
        with torch.no_grad():
            self._explain_patches(start, block, whole, scores, values)

    def _explain_patches(self, start: int, block: Tensor, whole: _Point, scores: Tensor, values: Tensor) -> None:
        stop = start + len(block)
        if "single" in self.methods:
            alone = values[:, None].expand(-1, scores.shape[1], -1)
            own = block[:, None].expand(-1, self.network.critical_count, -1)
            self.relevance["single"][start:stop] = self._answers(self._logits(alone, own))
        if "one_removed" in self.methods:
            left = self._left(start, scores, values, whole)
            critical = whole.critical.expand(len(block), *whole.critical.shape)
            answers = self._answers(self._logits(left, critical))
            self.relevance["one_removed"][start:stop] = self._answers(self.logits[None]) - answers
        if "shapley" in self.methods:
            summands = self.network.summands()
            assert summands is not None
            weights = (scores.double() - whole.pool.log_sum).exp()
            shares = torch.einsum("nh,khv,nv->nk", weights, summands.double(), values.double())
            none = torch.zeros_like(shares)
            self.relevance["shapley"][start:stop] = self._answers(shares) - self._answers(none)

    def _answers(self, logits: Tensor) -> NDArray[np.float64]:
        """Return the targets' scores [n, T] for logits [n, K]."""
        answers = [score(logits).double() for score in self.scores]
        return torch.stack(answers, dim=1).cpu().numpy() if answers else np.empty((len(logits), 0))

    def _left(self, start: int, scores: Tensor, values: Tensor, whole: _Point) -> Tensor:
        """Return the weighted means [n, H, V] that remain without each patch: (z - p_i v_i) / (1 - p_i)."""
        weights = (scores.double() - whole.pool.log_sum).exp()[..., None]
        left = (whole.pool.mean - weights * values.double()[:, None]) / (1 - weights)
        for h, row in enumerate(whole.pool.top_row.tolist()):
            if start <= row < start + len(left):
                left[row - start, h] = whole.pool.without_top[h]
        return left

    def _remove_critical(self, whole: _Point) -> None:
        """Answer again without each critical patch: others take its place, and all scores change."""
        for row in sorted(set(whole.chosen.tolist())):
            lost = np.full((1, len(self.targets)), np.nan)
            if len(self.features) > 1:
                point = _Point(1.0)
                self._pool([point], without=row)
                with torch.no_grad():
                    rest = self._logits(point.pool.mean, point.critical)[None]
                    lost = self._answers(self.logits[None]) - self._answers(rest)
            self.relevance["one_removed"][row] = lost[0]


class _WholeBag(_Bag):
    """A bag for a network that sees all patches at once, by autograd."""

    def explain(self) -> BagExplanation:
        """Return the explanation.

        Raises:
            ModelError: there is not enough memory.
        """
        self._check_memory(len(self.features))
        bag = self.block(0, len(self.features))
        with torch.no_grad():
            logits, attention = self.network(bag)
        self.logits = logits.double()
        self.scores = [score_of_bag(target, logits) for target in self.targets]
        if "gradient_x_input" in self.methods:
            self._chain("gradient_x_input", bag, self._gradients(bag, PLAIN))
        if "lrp" in self.methods:
            self._chain("lrp", bag, self._gradients(bag, LRP))
        if "integrated_gradients" in self.methods:
            self._explain_path(bag)
        with torch.no_grad():
            self._explain_patches(bag)
        known = {} if attention is None else {"attention": attention.double().cpu().numpy()}
        if attention is not None:
            weights = attention if self.network.attention_is == "weights" else attention.softmax(dim=0)
            known["attention_weight"] = weights.double().cpu().numpy()
        return BagExplanation(self.logits.cpu().numpy(), known, self.relevance)

    def _check_memory(self, count: int) -> None:
        refuse_large_bag(count, memory_needed(self.network, count, len(self.targets)), self.methods)

    def _explain_patches(self, bag: Tensor) -> None:
        for i in range(len(bag)) if "single" in self.methods else ():
            self.relevance["single"][i] = self._answer(bag[i : i + 1])
        whole = np.array([float(score(self.logits[None])[0]) for score in self.scores])
        for i in range(len(bag)) if "one_removed" in self.methods else ():
            rest = torch.cat([bag[:i], bag[i + 1 :]])
            self.relevance["one_removed"][i] = whole - self._answer(rest) if len(rest) else np.nan

    def _answer(self, bag: Tensor) -> NDArray[np.float64]:
        logits = self.network(bag).logits.double()
        return np.array([float(score(logits[None])[0]) for score in self.scores])
