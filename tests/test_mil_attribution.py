"""Each bag method is what its definition says, for every aggregator, in chunks as in one piece."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.bags import MODELS, D, K, bag, in_double
from wsi_gradcam.cam.targets import Target
from wsi_gradcam.errors import BagSizeError, ConfigError, ModelError
from wsi_gradcam.mil import attribution
from wsi_gradcam.mil.attribution import explain_bag, memory_needed
from wsi_gradcam.mil.networks import Pool, Pooled
from wsi_gradcam.mil.spec import BagExplanation

TARGETS = [Target("1", 1), Target("2-0", 2, 0), Target("predicted")]
COUNT = 23


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bags of tests are several chunks."""
    monkeypatch.setattr(attribution, "MAX_ROWS", 7)
    monkeypatch.setattr(attribution, "MIN_ROWS", 7)


def scores(logits: Tensor, predicted: int) -> Tensor:
    return torch.stack([logits[1], logits[2] - logits[0], logits[predicted]])


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_the_whole_bag(name: str, tmp_path: Path) -> None:
    network, answer = in_double(tmp_path, name)
    x = torch.from_numpy(bag(COUNT)).requires_grad_()
    logits = answer(x)
    expected = torch.stack(
        [torch.autograd.grad(s, x, retain_graph=True)[0] for s in scores(logits, int(logits.argmax()))], 1
    )
    given: list[NDArray[np.floating]] = []

    def take(method: str, start: int, block: NDArray[np.floating]) -> None:
        assert (method, start) == ("gradient_x_input", sum(map(len, given)))
        given.append(block)

    found = explain_bag(network, bag(COUNT), TARGETS, ["gradient_x_input"], coefficients=take)
    np.testing.assert_allclose(found.logits, logits.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(np.concatenate(given), expected.numpy(), rtol=1e-6, atol=1e-9)
    relevance = (expected * x.detach()[:, None]).sum(dim=2).numpy()
    np.testing.assert_allclose(found.relevance["gradient_x_input"], relevance, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("path_bytes", [0, attribution.PATH_BYTES])  # in chunks, and a whole point at once
@pytest.mark.parametrize("name", MODELS)
def test_integrated_gradients_are_the_mean_of_the_whole_bags_gradients_along_the_path(
    name: str, path_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attribution, "PATH_BYTES", path_bytes)
    network, answer = in_double(tmp_path, name)
    x, start = torch.from_numpy(bag(COUNT)), torch.from_numpy(bag(1, seed=1)[0] / 4)
    predicted, total = int(answer(x).argmax()), torch.zeros(COUNT, 3, x.shape[1], dtype=torch.float64)
    for node, weight in ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18)):  # three points' rule
        there = (start + node * (x - start)).requires_grad_()
        each = scores(answer(there), predicted)
        total += weight * torch.stack([torch.autograd.grad(s, there, retain_graph=True)[0] for s in each], 1)
    expected = (total * (x - start)[:, None]).sum(dim=2).numpy()
    given: list[NDArray[np.floating]] = []
    found = explain_bag(
        network,
        x.numpy(),
        TARGETS,
        ["integrated_gradients"],
        baseline=start.numpy(),
        coefficients=lambda _method, _start, block: given.append(block),
        steps=3,
    )
    np.testing.assert_allclose(np.concatenate(given), total.numpy(), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.relevance["integrated_gradients"], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("name", "within"), [("abmil of no first layer", 1e-9), ("abmil", 0.01), ("clam_mb", 0.01)])
def test_integrated_gradients_sum_to_what_the_logit_is_above_the_baselines(
    name: str, within: float, tmp_path: Path
) -> None:
    """To the last digits where the network is smooth, else as the steps allow for bends."""
    network, answer = in_double(tmp_path, name)
    found = explain_bag(network, bag(COUNT), TARGETS, ["integrated_gradients"])
    logits, none = answer(torch.from_numpy(bag(COUNT))), answer(torch.zeros(1, D, dtype=torch.float64))
    predicted = int(logits.argmax())
    expected = scores(logits, predicted) - scores(none, predicted)
    np.testing.assert_allclose(found.relevance["integrated_gradients"].sum(axis=0), expected, atol=within)


@pytest.mark.parametrize("name", MODELS)
def test_single_and_one_removed_are_what_other_bags_answer(name: str, tmp_path: Path) -> None:
    network, answer = in_double(tmp_path, name)
    x = torch.from_numpy(bag(COUNT))
    found = explain_bag(network, bag(COUNT), TARGETS, ["single", "one_removed"])
    with torch.no_grad():
        logits = answer(x)
        predicted = int(logits.argmax())
        single = torch.stack([scores(answer(x[i : i + 1]), predicted) for i in range(COUNT)])
        rest = [torch.cat([x[:i], x[i + 1 :]]) for i in range(COUNT)]
        lost = scores(logits, predicted) - torch.stack([scores(answer(each), predicted) for each in rest])
    np.testing.assert_allclose(found.relevance["single"], single.numpy(), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.relevance["one_removed"], lost.numpy(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in MODELS if "transmil" not in name])
def test_attention_is_of_the_whole_bag(name: str, tmp_path: Path) -> None:
    network, _ = in_double(tmp_path, name)
    found = explain_bag(network, bag(COUNT), [], ["attention"])
    whole = network(torch.from_numpy(bag(COUNT)))
    np.testing.assert_allclose(found.attention["attention"], whole.attention, rtol=1e-9)
    np.testing.assert_allclose(found.attention["attention_weight"], whole.attention.softmax(dim=0), rtol=1e-9)
    assert found.relevance == {}


def test_the_class_token_of_transmil_sees_patches_that_are_there_twice_once(tmp_path: Path) -> None:
    network, _ = in_double(tmp_path, "transmil")
    found = explain_bag(network, bag(COUNT), [], ["attention"])
    assert found.attention["attention"].shape == (COUNT, 2)
    np.testing.assert_array_equal(found.attention["attention"], found.attention["attention_weight"])
    padded = explain_bag(network, np.concatenate([bag(COUNT), bag(COUNT)[:2]]), [], ["attention"]).attention[
        "attention"
    ]
    np.testing.assert_allclose(found.attention["attention"][2:], padded[2:COUNT], rtol=1e-9)
    np.testing.assert_allclose(found.attention["attention"][:2], padded[:2] + padded[COUNT:], rtol=1e-9)


@pytest.mark.parametrize("name", ["abmil", "clam_sb", "clam_mb", "dsmil"])
def test_shapley_values_are_those_of_the_game_with_fixed_attention(name: str, tmp_path: Path) -> None:
    """Against all orders of five patches, of which those that are not there yet add nothing to the pooled values."""
    from itertools import permutations

    network, _ = in_double(tmp_path, name)
    assert isinstance(network, Pooled)
    few = bag(5)
    found = explain_bag(network, few, TARGETS[:2], ["shapley"]).relevance["shapley"]
    x = torch.from_numpy(few)
    with torch.no_grad():
        critical = x[network.critical_scores(x).argmax(dim=0)]
        each, values = network.instances(x, critical)
        weights = each.softmax(dim=0)

        def game(there: tuple[int, ...]) -> Tensor:
            return scores(network.head(weights[list(there)].T @ values[list(there)], critical), 0)[:2]

        orders = list(permutations(range(5)))
        expected = torch.zeros(5, 2, dtype=torch.float64)
        for order in orders:
            for k, i in enumerate(order):
                expected[i] += (game(order[: k + 1]) - game(order[:k])) / len(orders)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-9, atol=1e-12)


def relevance_of(network: object, x: NDArray[np.float64]) -> BagExplanation:
    return explain_bag(network, x, TARGETS, ["lrp"])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in MODELS if "transmil" not in name and name != "dsmil of MIL-Lab"])
def test_lrp_conserves_the_logit(name: str, tmp_path: Path) -> None:
    network, answer = in_double(tmp_path, name)
    found = relevance_of(network, bag(COUNT))
    logits = answer(torch.from_numpy(bag(COUNT)))
    np.testing.assert_allclose(
        found.relevance["lrp"].sum(axis=0), scores(logits, int(logits.argmax())).detach(), rtol=1e-4, atol=1e-4
    )


def test_pooling_as_a_stream_is_pooling_at_once() -> None:
    random = np.random.default_rng(0)
    for case in range(30):
        n, h, v = int(random.integers(2, 40)), int(random.integers(1, 4)), 3
        given = torch.from_numpy(random.normal(size=(n, h)) * random.choice([0.1, 3, 300]))
        values = torch.from_numpy(random.normal(size=(n, v)))
        pool = Pool()
        for start in range(0, n, 5):
            pool.add(start, given[start : start + 5], values[start : start + 5])
        np.testing.assert_allclose(pool.mean, given.softmax(dim=0).T @ values, rtol=1e-9, atol=1e-12, err_msg=f"{case}")
        np.testing.assert_allclose(pool.log_sum, given.logsumexp(dim=0), rtol=1e-12)
        assert pool.top_row.tolist() == given.argmax(dim=0).tolist()
        for k, row in enumerate(pool.top_row.tolist()):
            rest = torch.cat([given[:row, k], given[row + 1 :, k]]).softmax(dim=0)
            left = rest @ torch.cat([values[:row], values[row + 1 :]])
            np.testing.assert_allclose(pool.without_top[k], left, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["transmil", "dsmil of MIL-Lab"])
def test_lrp_through_norms_conserves_what_their_biases_and_the_class_token_leave(name: str, tmp_path: Path) -> None:
    network, _ = in_double(tmp_path, name)
    for key, value in network.named_parameters():
        if (key.endswith("bias") and "norm" in key) or key == "token":
            value.zero_()
    logits = network(torch.from_numpy(bag(COUNT))).logits
    found = relevance_of(network, bag(COUNT)).relevance["lrp"].sum(axis=0)
    np.testing.assert_allclose(found, scores(logits, int(logits.argmax())), rtol=1e-4, atol=1e-4)


def test_lrp_of_attention_mil_is_the_rule_of_the_paper(tmp_path: Path) -> None:
    """The rules as they are printed, layer by layer, in loops over neurons."""
    network, _ = in_double(tmp_path, "abmil with a layer behind the pooling")
    state = {key: value.double().numpy() for key, value in MODELS["abmil with a layer behind the pooling"][1].items()}

    def back(x: NDArray[np.float64], name: str, above: NDArray[np.float64]) -> NDArray[np.float64]:
        found = np.zeros_like(x)
        for k, row in enumerate(state[f"{name}.weight"]):
            z = float(row @ x)
            for j in range(len(x)):
                found[j] += row[j] * x[j] / (z + (1e-8 if z >= 0 else -1e-8)) * above[k]
        return found

    def forward(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        found: NDArray[np.float64] = state[f"{name}.weight"] @ x + state[f"{name}.bias"]
        return found

    x = bag(COUNT)
    values = np.maximum([forward(each, "linear_layers.0.0") for each in x], 0)
    raw = np.array([forward(np.tanh(forward(each, "attention.0")), "attention.2")[0] for each in values])
    weights = np.exp(raw) / np.exp(raw).sum()
    pooled = weights @ values
    hidden = np.maximum(forward(pooled, "out_layers.0.0"), 0)
    logits = forward(hidden, "classifier")
    for_pooled = back(pooled, "out_layers.0.0", back(hidden, "classifier", np.array([0, logits[1], 0])))
    expected = np.zeros(COUNT)
    for i in range(COUNT):
        share = values[i] * weights[i] / np.where(pooled > 0, pooled, 1) * for_pooled
        expected[i] = back(x[i], "linear_layers.0.0", share).sum()
    np.testing.assert_allclose(relevance_of(network, x).relevance["lrp"][:, 0], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["abmil", "dsmil", "transmil"])
def test_a_bag_of_one_patch(name: str, tmp_path: Path) -> None:
    network, answer = in_double(tmp_path, name)
    found = explain_bag(network, bag(1), TARGETS, ["gradient_x_input", "single", "one_removed"])
    logits = answer(torch.from_numpy(bag(1)))
    np.testing.assert_allclose(found.relevance["single"][0], scores(logits, int(logits.argmax())).detach(), rtol=1e-9)
    assert np.isnan(found.relevance["one_removed"]).all()


def test_what_cannot_be_explained_is_refused(tmp_path: Path) -> None:
    network, _ = in_double(tmp_path, "abmil with a layer behind the pooling")
    target = TARGETS[:1]
    with pytest.raises(ConfigError, match=r"'singel': expected .*; did you mean single"):
        explain_bag(network, bag(3), target, ["singel"])
    with pytest.raises(ModelError, match=r"features of shape \(3, 5\), but the aggregator takes \(patches, 12\)"):
        explain_bag(network, bag(3, width=5), target, ["single"])
    with pytest.raises(ModelError, match="without patches"):
        explain_bag(network, bag(0), target, ["single"])
    with pytest.raises(ConfigError, match="shapley: this aggregator is not additive"):
        explain_bag(network, bag(3), target, ["shapley"])
    with pytest.raises(ModelError, match=r"a baseline of shape \(3,\), expected \(12,\)"):
        explain_bag(network, bag(3), target, ["single"], baseline=np.zeros(3))
    broken = bag(COUNT)
    broken[17, 3] = np.inf
    with pytest.raises(ModelError, match="patch 17 is not finite"):
        explain_bag(network, broken, target, ["single"])


def test_a_bag_that_memory_does_not_hold_is_refused_with_the_bytes(tmp_path: Path) -> None:
    network, _ = in_double(tmp_path, "transmil")

    class Long:
        shape = (3_000_000_000, 12)

        def __len__(self) -> int:
            return self.shape[0]

    with pytest.raises(ModelError, match=r"a bag of 3,000,000,000 patches needs about [\d,]{15,} bytes of memory"):
        explain_bag(network, Long(), TARGETS[:1], ["gradient_x_input"])
    with pytest.raises(BagSizeError, match="one_removed: 2,500 patches would be removed one by one"):
        explain_bag(network, bag(2500), TARGETS[:1], ["one_removed"])


def test_memory_grows_with_a_bag_only_where_it_is_seen_at_once(tmp_path: Path) -> None:
    chunked, _ = in_double(tmp_path, "clam_mb")
    whole, _ = in_double(tmp_path, "transmil")
    assert memory_needed(chunked, 200_000) < 1.5 * memory_needed(chunked, 1000)
    assert memory_needed(whole, 200_000) > 50 * memory_needed(whole, 1000)


def test_asking_how_much_memory_a_bag_takes_keeps_none_of_it(tmp_path: Path) -> None:
    whole, _ = in_double(tmp_path, "transmil")

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(one), Tensor) for one in gc.get_objects())

    memory_needed(whole, 1000)
    before = tensors()
    memory_needed(whole, 1000)
    assert tensors() == before


def test_targets_of_other_classes_are_refused(tmp_path: Path) -> None:
    network, _ = in_double(tmp_path, "abmil")
    with pytest.raises(Exception, match=f"the aggregator has {K} logits"):
        explain_bag(network, bag(3), [Target("9", 9)], ["single"])


@pytest.mark.slow
def test_a_bag_of_200000_patches_takes_less_than_1500_mebibytes() -> None:
    import subprocess
    import sys

    from benchmarks.bags import LIMIT_BYTES

    command = [sys.executable, "-m", "benchmarks.bags", "200000"]
    assert int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) < LIMIT_BYTES
