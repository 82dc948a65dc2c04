"""float32 is IEEE float32 wherever a network runs, whatever torch's flags say, and TF32 is a precision by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.split_models import Split, pictures, pooled, relative
from wsi_gradcam.audit.measures.subject import Subject
from wsi_gradcam.cam import trunks
from wsi_gradcam.cam.engine import explain_batch
from wsi_gradcam.cam.explainer import Explainer, Request
from wsi_gradcam.cam.facts import Layer
from wsi_gradcam.cam.layers import check_layer
from wsi_gradcam.cam.program import EagerProgram, SplitProgram, cut_at
from wsi_gradcam.cam.targets import PREDICTED, Target
from wsi_gradcam.cam.trunks import exact, in_precision, low_precisions, make_trunk
from wsi_gradcam.errors import EngineError
from wsi_gradcam.gradcam import GradCAM
from wsi_gradcam.models.load import Model, model_of

CUDA = torch.device("cuda")
BACKENDS: Any = torch.backends
UNINITIALIZED: Any = torch.utils.deterministic
NEWER = hasattr(BACKENDS.cuda.matmul, "fp32_precision")


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    """Flags of torch are as they were after each test."""
    before = trunks._float32_flags()
    yield
    if NEWER:
        BACKENDS.fp32_precision = "none"
        for operator in trunks._operators():
            operator.fp32_precision = "none"
    trunks._set_float32(*before)


def seen() -> dict[str, bool]:
    """What torch's flags mean now, all of them: those of the older interface raise where they contradict the newer."""
    found = {
        "cudnn tf32": bool(BACKENDS.cudnn.allow_tf32),
        "matmul tf32": bool(BACKENDS.cuda.matmul.allow_tf32),
        "matmul low": torch.get_float32_matmul_precision() != "highest",
    }
    for number, operator in enumerate(trunks._operators()):
        found[f"operator {number}"] = operator.fp32_precision in ("tf32", "bf16")
    return found


class Watched(Split):
    """Remembers the flags of each forward pass, and of each backward pass through it."""

    def __init__(self) -> None:
        network = pooled()
        super().__init__(network.features, network.head)
        self.seen: list[dict[str, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(seen())
        logits: Tensor = super().forward(images)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: self.seen.append(seen()))  # type: ignore[no-untyped-call]
        return logits


def as_a_script_does() -> None:
    """The lines of many training scripts, which a model's own code may hold too."""
    torch.set_float32_matmul_precision("high")
    BACKENDS.cudnn.allow_tf32 = True


def as_newer_scripts_do() -> None:
    BACKENDS.fp32_precision = "tf32"


def as_one_operator() -> None:
    BACKENDS.cudnn.conv.fp32_precision = "tf32"
    BACKENDS.cuda.matmul.fp32_precision = "tf32"


def as_processors_do() -> None:
    torch.set_float32_matmul_precision("medium")


NEWER_ONLY = pytest.mark.skipif(not NEWER, reason="torch has no such flags yet")
HABITS = [
    lambda: None,
    as_a_script_does,
    as_processors_do,
    pytest.param(as_newer_scripts_do, marks=NEWER_ONLY),
    pytest.param(as_one_operator, marks=NEWER_ONLY),
]


def model(network: nn.Module) -> Model:
    return model_of(network, patch_px=32, mean=(0, 0, 0), std=(1, 1, 1), layer="features")


def watched(explainable: Model) -> Watched:
    network = explainable.module
    assert isinstance(network, Watched)
    network.seen.clear()
    return network


@pytest.mark.parametrize("habit", HABITS)
def test_a_run_explains_in_ieee_float32(habit: Callable[[], None]) -> None:
    explainable = model(Watched())
    habit()
    before = trunks._float32_flags()
    network = watched(explainable)
    explainer = Explainer.examine(explainable, Request(batch_size=2), lambda _: None)
    rgb = torch.zeros(2, 32, 32, 3, dtype=torch.uint8).numpy()
    explainer.explain(rgb, (Target(PREDICTED),), ("gradcam", "gradient"))
    assert len(network.seen) > 4
    assert not any(value for flags in network.seen for value in flags.values())
    assert trunks._float32_flags()[:2] == before[:2]  # a notebook's own training goes on as it did


@pytest.mark.parametrize("habit", HABITS)
def test_plain_images_are_explained_in_ieee_float32(habit: Callable[[], None]) -> None:
    network = Watched()
    habit()
    before = trunks._float32_flags()
    GradCAM(network, "features", method="gradcam,gradient")(pictures(2))
    assert network.seen
    assert not any(value for flags in network.seen for value in flags.values())
    assert trunks._float32_flags()[:2] == before[:2]


def test_the_audits_subject_is_examined_in_ieee_float32() -> None:
    explainable = model(Watched())
    as_a_script_does()
    network = watched(explainable)
    Subject.of(explainable, layer="features", batch_size=2)
    assert network.seen
    assert not any(value for flags in network.seen for value in flags.values())


@pytest.mark.parametrize("habit", HABITS)
def test_flags_are_set_and_put_back(habit: Callable[[], None]) -> None:
    habit()
    before = seen() if habit is not as_one_operator else None  # there torch refuses to answer
    with exact(CUDA):
        assert not any(seen().values())
        with exact(CUDA, tf32=True):
            assert seen()["cudnn tf32"]
            assert seen()["matmul tf32"]
        assert not any(seen().values())
    assert before is None or seen() == before


def test_kernels_on_cuda_are_those_whose_sums_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    def modes() -> tuple[bool, ...]:
        cudnn = BACKENDS.cudnn
        return (
            cudnn.deterministic,
            cudnn.benchmark,
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            UNINITIALIZED.fill_uninitialized_memory,
        )

    before = modes()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with exact(CUDA):
        assert modes() == (True, False, True, True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # else its matrix products need not repeat
        with exact(CUDA, tf32=True):
            assert modes() == (True, False, True, True, False)
    assert modes() == before
    with exact(torch.device("cpu")):  # where other kernels would give other bytes than before
        assert modes() == before


def test_flags_are_put_back_after_an_error() -> None:
    as_a_script_does()
    with pytest.raises(ValueError, match="for the test"), exact(CUDA), exact(CUDA, tf32=True):
        raise ValueError("for the test")
    assert not trunks._SET
    assert seen()["cudnn tf32"]
    assert not torch.are_deterministic_algorithms_enabled()


class OnCuda:
    """A batch that says that it is on a GPU."""

    device = CUDA

    def to(self, *_: Any, **__: Any) -> OnCuda:
        return self


@pytest.mark.parametrize(("precision", "expected"), [("tf32", True), ("bfloat16", False)])
def test_a_trunk_in_tf32_runs_in_tf32_and_nothing_else_does(
    precision: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[dict[str, bool]] = []

    class Graph(nn.Module):
        def forward(self, batch: Any) -> tuple[Tensor, ...]:
            inside.append(seen())
            return (torch.zeros(1),)

    batch: Any = OnCuda()
    graph: Any = Graph()
    with exact(CUDA):
        trunk = (
            make_trunk(graph, "eager", precision, batch) if precision == "float32" else in_precision(graph, precision)
        )
        trunk(batch)
        assert not any(seen().values())
    assert {flags["cudnn tf32"] for flags in inside} == {expected}
    assert {flags["matmul tf32"] for flags in inside} == {expected}


@pytest.mark.parametrize("engine", ["eager", "compile", "cudagraphs", "openvino"])
def test_tf32_is_refused_where_there_is_none(engine: str) -> None:
    with pytest.raises(EngineError, match=r"precision tf32 exists only on NVIDIA GPUs, .* on cpu; use float32"):
        GradCAM(pooled(), "features", engine=engine, precision="tf32")(pictures(2))


@pytest.mark.parametrize(
    ("capability", "bfloat16", "expected"),
    [
        ((9, 0), True, ("tf32", "bfloat16", "float16")),
        ((8, 0), True, ("tf32", "bfloat16", "float16")),
        ((7, 5), False, ("float16",)),
    ],
)
def test_precisions_of_gpus_are_those_they_have_hardware_for(
    capability: tuple[int, int], bfloat16: bool, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16 or including_emulation)
    assert low_precisions("eager", CUDA) == expected
    assert low_precisions("compile", CUDA) == expected


@pytest.mark.parametrize("tf32", [False, True])
def test_a_head_may_be_in_tf32_where_its_trunk_is_no_more_exact(tf32: bool) -> None:
    """Forward and backward, and nothing else: what runs the whole network stays in IEEE float32."""
    network, images = pooled(), pictures(2)
    layer = Layer("features", check_layer(network, "features", images))
    trunk, head = cut_at(network, "features", images)
    inside, before = [], seen()

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            inside.append(seen()["matmul tf32"])
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            inside.append(seen()["matmul tf32"])
            return gradients

    def watched(value: Tensor, *others: Any) -> Tensor:
        found: Tensor = head(Watched.apply(value), *others)
        return found

    watched.meta = head.meta  # type: ignore[attr-defined]
    program = SplitProgram(network, layer, trunk, cast(Any, watched), tf32)
    maps = explain_batch(program, images, [Target("a", 0)], ["gradcam"]).cams["gradcam"]
    assert inside == [tf32, tf32]
    assert seen() == before
    expected = explain_batch(EagerProgram(network, (layer,)), images, [Target("a", 0)]).cams["gradcam"]
    assert relative(maps, expected) < 1e-5
    inside.clear()
    explain_batch(program, images, [Target("a", 0)], ["ablationcam"])
    assert inside[0] == tf32
    assert not any(inside[1:])
