"""The choice: the fastest program that keeps the maps, told with its figures; and what cannot be had is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor, fx, nn

from tests.split_models import curved, pictures, relative
from wsi_gradcam.cam import auto, trunks
from wsi_gradcam.cam.auto import MAX_PEAK_RISK, MIN_PEARSON, MIN_SPEEDUP, choose, fidelity, make_program, reuse_choice
from wsi_gradcam.cam.engine import explain_batch
from wsi_gradcam.cam.facts import Choice, Layer, Trial
from wsi_gradcam.cam.layers import check_layer
from wsi_gradcam.cam.methods import Score
from wsi_gradcam.cam.program import EagerProgram, Program, SplitProgram
from wsi_gradcam.cam.targets import Target
from wsi_gradcam.cam.trunks import Trunk
from wsi_gradcam.errors import EngineError

NOISE = {"float32": 0.0, "bfloat16": 1e-3, "float16": 1e-4}


@pytest.fixture
def network() -> nn.Module:
    return curved()


@pytest.fixture
def images() -> Tensor:
    return pictures(12)


def layers_of(network: nn.Module, *names: str) -> tuple[Layer, ...]:
    return tuple(Layer(name, check_layer(network, name, pictures(2))) for name in names or ("features",))


class Bench:
    """Engines of the test's own: how fast they are, how noisy, and which cannot run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rates: dict[tuple[str, str], float] = {("eager", "float32"): 10.0}
        self.noise = dict(NOISE)
        self.broken: dict[tuple[str, str], str] = {}
        self.known: dict[str, tuple[str, ...]] = {"eager": ("bfloat16",), "openvino": ("bfloat16", "float16")}
        self.engines: tuple[str, ...] = ("openvino",)
        self.timed: list[tuple[str, str]] = []
        self.made: dict[int, tuple[str, str]] = {}
        self._timed = auto._timed
        monkeypatch.setattr(auto, "make_trunk", self.make_trunk)
        monkeypatch.setattr(auto, "low_precisions", lambda engine, device: self.known[engine])
        monkeypatch.setattr(auto, "find_spec", lambda name: name if "openvino" in self.engines else None)
        monkeypatch.setattr(auto, "_timed", self.timed_by_hand)
        monkeypatch.setattr(auto, "TIMED_S", 1e-9)

    def make_trunk(self, graph: fx.GraphModule, engine: str, precision: str, images: Tensor) -> Trunk:
        if (engine, precision) in self.broken:
            raise EngineError(self.broken[engine, precision])
        generator = torch.Generator().manual_seed(1)

        def run(batch: Tensor) -> tuple[Tensor, ...]:
            value, *others = graph(batch)
            noise = torch.randn(value.shape, generator=generator) * value.abs().amax() * self.noise[precision]
            return (value + noise, *others)

        self.made[id(run)] = (engine, precision)
        self.kept = [*getattr(self, "kept", []), run]  # ids stay their own
        return run

    def timed_by_hand(
        self, program: Program, batches: Sequence[Tensor], asked: Sequence[Score]
    ) -> tuple[Tensor, float]:
        cams, _ = self._timed(program, batches, asked)
        key = self.made[id(program._trunk)] if isinstance(program, SplitProgram) else ("eager", "float32")
        self.timed.append(key)
        return cams, self.rates.get(key, 1.0)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def chosen(choice: Choice) -> tuple[str, str]:
    return choice.engine, choice.precision


# --- fidelity ---


def by_numpy(cams: Tensor, reference: Tensor) -> tuple[float, float]:
    pairs = list(zip(cams.flatten(0, 1).flatten(1).numpy(), reference.flatten(0, 1).flatten(1).numpy(), strict=True))
    least = min(np.corrcoef(found, expected)[0, 1] for found, expected in pairs)
    return float(least), float(np.mean([found.argmax() == expected.argmax() for found, expected in pairs]))


@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0])
def test_fidelity_is_the_lowest_correlation_and_the_share_of_equal_peaks(noise: float) -> None:
    generator = torch.Generator().manual_seed(4)
    reference = torch.randn(9, 2, 5, 4, generator=generator) * torch.logspace(-6, 6, 9)[:, None, None, None]
    size = reference.abs().amax(dim=(2, 3), keepdim=True)
    cams = reference + noise * size * torch.randn(reference.shape, generator=generator)
    found = fidelity(cams, reference)
    pearson, same = by_numpy(cams, reference)
    assert found.pearson == pytest.approx(pearson, abs=1e-5)
    assert found.same_peak == pytest.approx(same)


def test_fidelity_of_the_same_maps_is_perfect() -> None:
    maps = torch.randn(4, 3, 6, 6)
    found = fidelity(maps, maps)
    assert (found.same_peak, found.peak_risk) == (1.0, 0.0)
    assert found.pearson == pytest.approx(1.0, abs=1e-12)


def test_a_scale_and_an_offset_do_not_matter_to_the_correlation() -> None:
    maps = torch.randn(4, 1, 6, 6)
    assert fidelity(3 * maps - 7, maps).pearson == pytest.approx(1.0, abs=1e-6)
    assert fidelity(-maps, maps).pearson == pytest.approx(-1.0, abs=1e-6)


def test_constant_maps_are_alike_and_a_constant_one_and_another_are_not() -> None:
    varied, flat = torch.randn(1, 1, 7, 7), torch.full((1, 1, 7, 7), 0.1)
    assert fidelity(torch.cat([varied, flat, 0 * flat]), torch.cat([varied, 2 * flat, flat])).pearson == pytest.approx(
        1
    )
    assert fidelity(torch.cat([varied, varied]), torch.cat([varied, flat])).pearson == 0.0
    assert fidelity(torch.cat([varied, flat]), torch.cat([varied, varied])).pearson == 0.0
    assert fidelity(flat, flat).peak_risk == 0.0  # not NaN


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_maps_that_are_not_finite_are_not_alike(wrong: float) -> None:
    maps = torch.randn(3, 1, 4, 4)
    broken = maps.clone()
    broken[1, 0, 2, 2] = wrong
    assert fidelity(broken, maps).pearson == -1.0
    assert fidelity(broken, broken).pearson == -1.0


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.2])
def test_peak_risk_tells_of_many_maps_what_a_few_show(noise: float) -> None:
    """32 maps, of whose peaks perhaps none moves, against the share among 100,000 of the same kind."""
    generator = torch.Generator().manual_seed(6)

    def maps(count: int) -> tuple[Tensor, Tensor]:
        reference = torch.randn(count, 1, 7, 7, generator=generator).double()
        return reference + noise * torch.randn(reference.shape, generator=generator), reference

    cams, reference = maps(100_000)
    moved = float((cams.flatten(1).argmax(dim=1) != reference.flatten(1).argmax(dim=1)).double().mean())
    estimates = [fidelity(*maps(32)).peak_risk for _ in range(60)]
    # Only the second highest cell is followed, and any of the others may overtake.
    assert 0.6 * moved < float(np.mean(estimates)) < 1.2 * moved
    assert float(np.median(estimates)) > 0.5 * moved


# --- the choice ---


def test_a_faster_faithful_program_is_taken(bench: Bench, network: nn.Module, images: Tensor) -> None:
    bench.noise["bfloat16"] = 1e-4
    bench.rates |= {("openvino", "float32"): 15.0, ("openvino", "bfloat16"): 40.0, ("openvino", "float16"): 50.0}
    choice, program = choose(network, layers_of(network), "auto", "auto", images, 4)
    assert chosen(choice) == ("openvino", "bfloat16")
    assert isinstance(program, SplitProgram)
    trials = {(t.engine, t.precision): t for t in choice.trials}
    assert list(trials) == [("eager", "float32"), ("openvino", "float32"), ("openvino", "bfloat16")]
    assert trials["openvino", "bfloat16"].patches_per_s == 40.0
    assert 1 > (trials["openvino", "bfloat16"].pearson or 0) >= MIN_PEARSON
    assert all(not trial.remark for trial in choice.trials)
    expected = explain_batch(EagerProgram(network, layers_of(network)), images, [Target("predicted")])
    found = explain_batch(program, images, [Target("predicted")])
    assert 0 < relative(found.cams["gradcam"], expected.cams["gradcam"]) < 0.05


def test_a_precision_that_changes_maps_is_not_taken(bench: Bench, network: nn.Module, images: Tensor) -> None:
    bench.noise |= {"bfloat16": 0.3, "float16": 0.3}
    bench.rates |= {("openvino", "float32"): 11.0, ("openvino", "bfloat16"): 99.0, ("openvino", "float16"): 99.0}
    choice, program = choose(network, layers_of(network), "auto", "auto", images, 4)
    assert chosen(choice) == ("eager", "float32")
    assert isinstance(program, EagerProgram)
    assert not isinstance(program, SplitProgram)
    remarks = {(t.engine, t.precision): t.remark for t in choice.trials}
    assert remarks == {
        ("eager", "float32"): "",
        ("openvino", "float32"): f"not {MIN_SPEEDUP:g} times faster than eager float32",
        ("openvino", "bfloat16"): "maps differ from float32's",
        ("openvino", "float16"): "maps differ from float32's",
    }
    low = choice.trials[2]
    assert low.patches_per_s == 99.0  # what was given up is told
    assert (low.pearson or 1) < MIN_PEARSON or (low.peak_risk or 0) > MAX_PEAK_RISK


def test_only_peaks_that_move_are_enough_to_refuse(
    bench: Bench, network: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.rates["openvino", "bfloat16"] = 99.0
    for risk, taken in ((MAX_PEAK_RISK, True), (2 * MAX_PEAK_RISK, False)):
        monkeypatch.setattr(auto, "fidelity", lambda cams, reference, risk=risk: auto.Fidelity(1.0, 1.0, risk))
        choice, _ = choose(network, layers_of(network), "auto", "auto", images, 4)
        assert (choice.precision == "bfloat16") == taken


@pytest.mark.parametrize(("rate", "taken"), [(11.9, False), (12.0, True)])
def test_a_gain_must_be_worth_it(rate: float, taken: bool, bench: Bench, network: nn.Module, images: Tensor) -> None:
    bench.known["openvino"] = ()
    bench.rates["openvino", "float32"] = rate
    choice, _ = choose(network, layers_of(network), "auto", "auto", images, 4)
    assert chosen(choice) == (("openvino", "float32") if taken else ("eager", "float32"))


def test_the_choice_is_the_same_for_the_same_trials(bench: Bench, network: nn.Module, images: Tensor) -> None:
    bench.rates |= {("openvino", "float32"): 15.0, ("openvino", "bfloat16"): 40.0}
    first, second = (choose(network, layers_of(network), "auto", "auto", images, 4)[0] for _ in range(2))
    assert first == second


def test_what_is_asked_for_is_used_without_trials(bench: Bench, network: nn.Module, images: Tensor) -> None:
    bench.noise["bfloat16"] = 0.3
    choice, program = choose(network, layers_of(network), "openvino", "bfloat16", images, 4)
    assert choice == Choice("openvino", "bfloat16")
    assert isinstance(program, SplitProgram)
    assert not bench.timed
    choice, program = choose(network, layers_of(network), "eager", "float32", images, 4)
    assert choice == Choice("eager", "float32")
    assert not isinstance(program, SplitProgram)


def test_a_precision_that_is_asked_for_need_not_keep_the_maps(bench: Bench, network: nn.Module, images: Tensor) -> None:
    bench.noise["bfloat16"] = 0.3
    choice, _ = choose(network, layers_of(network), "auto", "bfloat16", images, 4)
    assert chosen(choice) == ("openvino", "bfloat16")
    assert (choice.trials[-1].pearson or 1) < MIN_PEARSON  # but it is told
    assert [t.remark for t in choice.trials] == ["", ""]


def test_an_engine_that_is_asked_for_is_used_in_the_precision_that_keeps_the_maps(
    bench: Bench, network: nn.Module, images: Tensor
) -> None:
    bench.noise |= {"bfloat16": 0.3, "float16": 0.3}
    bench.rates |= {("openvino", "float32"): 1.0, ("openvino", "bfloat16"): 99.0}
    assert chosen(choose(network, layers_of(network), "openvino", "auto", images, 4)[0]) == ("openvino", "float32")
    assert chosen(choose(network, layers_of(network), "eager", "auto", images, 4)[0]) == ("eager", "float32")


def test_float32_that_is_none_is_refused(bench: Bench, network: nn.Module, images: Tensor) -> None:
    """An engine may get a network wrong: in float32 its outputs must be the network's own."""
    bench.noise["float32"] = 0.1
    bench.rates["openvino", "float32"] = 99.0
    problem = "engine openvino gives outputs that differ from the model's by 0"
    with pytest.raises(EngineError, match=problem):
        make_program(network, layers_of(network), "openvino", "float32", images)
    choice, _ = choose(network, layers_of(network), "auto", "float32", images, 4)
    assert chosen(choice) == ("eager", "float32")
    assert problem in choice.trials[1].remark


def test_without_openvino_pytorchs_own_bfloat16_is_tried(bench: Bench, network: nn.Module, images: Tensor) -> None:
    bench.engines = ()
    bench.noise["bfloat16"] = 1e-5
    bench.rates["eager", "bfloat16"] = 30.0
    choice, _ = choose(network, layers_of(network), "auto", "auto", images, 4)
    assert chosen(choice) == ("eager", "bfloat16")


def test_where_openvino_fails_in_the_precision_asked_for_pytorch_is_used(
    bench: Bench, network: nn.Module, images: Tensor
) -> None:
    bench.broken["openvino", "bfloat16"] = "unsupported operator"
    choice, _ = choose(network, layers_of(network), "auto", "bfloat16", images, 4)
    assert chosen(choice) == ("eager", "bfloat16")
    assert choice.trials[1] == Trial("openvino", "bfloat16", remark="unsupported operator")


def test_a_program_that_fails_when_it_runs_is_passed_over(
    bench: Bench, network: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: SplitProgram, images: Tensor) -> Tensor:
        raise RuntimeError("expected scalar type Long\nbut found Float")

    monkeypatch.setattr(SplitProgram, "predict", fail)
    choice, _ = choose(network, layers_of(network), "auto", "auto", images, 4)
    assert chosen(choice) == ("eager", "float32")
    assert choice.trials[1].remark == (
        "engine openvino cannot run this model in float32: RuntimeError: expected scalar type Long but found Float"
    )


@pytest.mark.parametrize(
    ("engine", "precision", "problem"),
    [
        ("openvino", "auto", "no engine works with --engine openvino --precision auto: openvino float32: not here; "),
        ("openvino", "bfloat16", "^not here"),
        ("quantum", "auto", "engine 'quantum' is not known; expected auto, eager, compile, cudagraphs, openvino"),
        ("auto", "int4", "precision 'int4' is not known; expected auto, float32, tf32, bfloat16, float16"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason(
    engine: str, precision: str, problem: str, bench: Bench, network: nn.Module, images: Tensor
) -> None:
    bench.broken = {("openvino", name): "not here" for name in NOISE}
    with pytest.raises(EngineError, match=problem):
        choose(network, layers_of(network), engine, precision, images, 4)


def test_several_layers_are_explained_whole(bench: Bench, network: nn.Module, images: Tensor) -> None:
    layers = layers_of(network, "features.2", "features")
    choice, _ = choose(network, layers, "auto", "auto", images, 4)
    assert chosen(choice) == ("eager", "float32")
    assert choice.trials[1].remark == "several layers can be explained only with eager float32"
    with pytest.raises(EngineError, match="several layers"):
        choose(network, layers, "openvino", "auto", images, 4)


def test_maps_of_all_patches_are_compared_and_the_first_batch_is_timed(
    network: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    explain: Callable[..., Any] = explain_batch

    def counted(program: Program, some: Tensor, *rest: Any) -> Any:
        calls.append(len(some))
        return explain(program, some, *rest)

    monkeypatch.setattr(auto, "explain_batch", counted)
    monkeypatch.setattr(auto, "TIMED_S", 1e9)
    program, batches = EagerProgram(network, layers_of(network)), torch.split(images, 5)
    cams, rate = auto._timed(program, batches, auto._predictions(program, batches))
    assert calls == [5, 5, 2] + [5] * auto.MAX_TIMINGS
    assert cams.shape[0] == 12
    assert rate > 0


def test_programs_are_asked_about_the_classes_that_float32_predicts(
    bench: Bench, network: nn.Module, images: Tensor
) -> None:
    """Where two classes are nearly as likely, another precision may predict the other, and explain something else."""
    linear = network.get_submodule("head.5")
    assert isinstance(linear, nn.Linear)
    images = images[:1].expand(12, -1, -1, -1).contiguous()
    with torch.no_grad():
        evidence = network(images)[0, 0] - linear.bias[0]
        linear.weight[1], linear.bias[0], linear.bias[1] = -linear.weight[0], -evidence, evidence
        linear.bias[2:] = -100
    bench.noise["bfloat16"] = 1e-5
    bench.rates["openvino", "bfloat16"] = 99.0
    choice, program = choose(network, layers_of(network), "auto", "auto", images, 4)
    plain = EagerProgram(network, layers_of(network))
    assert (plain.predict(images).argmax(dim=1) != program.predict(images).argmax(dim=1)).any()
    assert choice.precision == "bfloat16"


@pytest.mark.parametrize(("noise", "again"), [(1e-4, True), (0.3, False)])
def test_a_choice_made_before_is_checked_on_the_patches_of_now(
    noise: float, again: bool, bench: Bench, network: nn.Module, images: Tensor
) -> None:
    bench.noise["bfloat16"] = noise
    program = reuse_choice(Choice("openvino", "bfloat16"), network, layers_of(network), images, 4)
    assert isinstance(program, SplitProgram) == again
    assert (program is None) != again
    assert not bench.timed


def test_a_choice_that_cannot_be_had_any_more_is_none(bench: Bench, network: nn.Module, images: Tensor) -> None:
    bench.broken["openvino", "float32"] = "not here"
    assert reuse_choice(Choice("openvino", "float32"), network, layers_of(network), images, 4) is None


def test_a_choice_of_an_engine_that_is_not_known_any_more_is_none(network: nn.Module, images: Tensor) -> None:
    assert reuse_choice(Choice("quantum", "float32"), network, layers_of(network), images, 4) is None


@pytest.mark.parametrize(("engine", "precision"), [("eager", "bfloat16"), ("openvino", "float32")])
def test_real_programs_are_chosen_and_made(engine: str, precision: str, network: nn.Module, images: Tensor) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino", reason="only the engines extra installs OpenVINO")
    program = make_program(network, layers_of(network), engine, precision, images[:4])
    expected = explain_batch(EagerProgram(network, layers_of(network)), images, [Target("predicted")])
    found = explain_batch(program, images, [Target("predicted")])
    same = fidelity(found.cams["gradcam"], expected.cams["gradcam"])
    assert same.pearson > (0.99 if precision == "bfloat16" else 1 - 1e-9)


@pytest.mark.parametrize(("noise", "expected"), [(1e-6, "tf32"), (0.05, "float32")])
def test_tf32_is_held_to_the_same_agreement_as_lower_precisions(
    noise: float, expected: str, bench: Bench, network: nn.Module, images: Tensor
) -> None:
    """TF32 as cuDNN has it by default took a trained EfficientNet-Lite0 to a correlation of 0.9997."""
    bench.engines, bench.known["eager"] = (), ("tf32",)
    bench.rates["eager", "tf32"], bench.noise["tf32"] = 100.0, noise
    choice, _ = choose(network, layers_of(network), "auto", "auto", images, 4)
    assert chosen(choice) == ("eager", expected)
    (trial,) = [trial for trial in choice.trials if trial.precision == "tf32"]
    assert (trial.remark == "maps differ from float32's") == (expected == "float32")


@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_a_class_tokens_last_block_computes_no_more_than_it_reads(
    bench: Bench, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever way eager float32 was chosen, so that workers, which are told the choice, compute the same."""
    monkeypatch.setattr(auto, "make_trunk", trunks.make_trunk)
    bench.engines = ()
    bench.known["eager"] = ()
    torch.manual_seed(0)
    network = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5).eval()
    images = torch.randn(8, 3, 32, 32)
    layers = (Layer("blocks.0", check_layer(network, "blocks.0", images[:2])),)
    choice, program = choose(network, layers, engine, engine.replace("eager", "float32"), images, 4)
    assert chosen(choice) == ("eager", "float32")
    assert isinstance(program, SplitProgram)
    again = make_program(network, layers, "eager", "float32", images[:4])
    target = [Target("c", 2)]
    expected = explain_batch(EagerProgram(network, layers), images, target).cams["gradcam"]
    found = explain_batch(program, images, target).cams["gradcam"]
    assert relative(found, expected) < 1e-5
    assert torch.equal(explain_batch(again, images, target).cams["gradcam"], found)
