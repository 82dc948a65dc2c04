"""Whatever engine runs a trunk in whatever precision: float32 comes out, alike, the same on any number of threads."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from tests.split_models import curved, pictures, pooled, relative
from wsi_gradcam.cam import trunks
from wsi_gradcam.cam.auto import make_program
from wsi_gradcam.cam.engine import explain_batch
from wsi_gradcam.cam.facts import Layer
from wsi_gradcam.cam.layers import check_layer, find_layer, probe_images
from wsi_gradcam.cam.program import cut_at, trace_operators
from wsi_gradcam.cam.targets import Target
from wsi_gradcam.cam.trunks import folded, in_precision, low_precisions, make_trunk
from wsi_gradcam.errors import EngineError

CPU = torch.device("cpu")
# float16: 0.0051 where a CPU adds up in it as well
CLOSE = {"float32": 1e-5, "bfloat16": 0.03, "float16": 0.01}


@pytest.fixture
def openvino() -> None:
    pytest.importorskip("openvino", reason="only the engines extra installs OpenVINO")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def trunk_of(network: nn.Module, layer: str, images: Tensor) -> fx.GraphModule:
    return cut_at(network, layer, images)[0]


@pytest.mark.parametrize("precision", CLOSE)
@pytest.mark.parametrize("engine", ["eager", "openvino"])
@pytest.mark.parametrize("build", [curved, pooled])
def test_values_are_float32_and_close(engine: str, precision: str, build: type[nn.Module], openvino: None) -> None:
    """In the precisions that a machine has no instructions for, engines calculate in another."""
    network, images = build(), pictures(3)
    graph = trunk_of(network, "features", images)
    (expected,) = graph(images)
    trunk = make_trunk(graph, engine, precision, images)
    (found,) = trunk(images)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert not found.requires_grad
    assert relative(found, expected) < CLOSE[precision]
    if precision in low_precisions(engine, CPU):
        assert relative(found, expected) > 1e-5  # it is low indeed
    with torch.no_grad():
        again = trunk(images.flip(0))[0]
    assert relative(again, expected.flip(0)) < CLOSE[precision]
    assert relative(found, expected) < CLOSE[precision]  # what was given before stays as it was
    assert relative(trunk(images[:1])[0], expected[:1]) < CLOSE[precision]


def test_a_low_precision_leaves_the_graph_as_it_was() -> None:
    images = pictures(2)
    graph = trunk_of(curved(), "features", images)
    before = [tensor.clone() for tensor in graph.buffers()]
    make_trunk(graph, "eager", "bfloat16", images)
    assert all(torch.equal(a, b) for a, b in zip(graph.buffers(), before, strict=True))
    assert {tensor.dtype for tensor in graph.buffers()} <= {torch.float32, torch.int64}


def trained(network: nn.Module) -> nn.Module:
    """With statistics such as training leaves, far from 0 and 1."""
    random = torch.Generator().manual_seed(5)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.copy_(torch.randn(len(part.running_mean), generator=random))
            part.running_var.copy_(0.2 + 3 * torch.rand(len(part.running_var), generator=random))
    return network.eval()


def normalisations(graph: fx.GraphModule) -> int:
    return sum(node.target is torch.ops.aten.batch_norm.default for node in graph.graph.nodes)


@pytest.mark.parametrize(
    ("network", "left"),
    [
        (lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=3), 0),
        (lambda: DenseNet(8, (2, 2), 8, num_classes=3), 6),  # there most stand before their convolution
    ],
)
def test_batch_normalisations_are_folded_into_the_convolutions_before_them(
    network: Callable[[], nn.Module], left: int
) -> None:
    images = pictures(2)
    graph = trace_operators(trained(network()), images)
    before, expected = normalisations(graph), graph(images)
    made = folded(graph)
    assert normalisations(made) == left
    assert relative(made(images), expected) < 1e-5
    assert normalisations(graph) == before
    assert torch.equal(graph(images), expected)
    weights = [sum(tensor.numel() for tensor in each.buffers()) for each in (made, graph)]
    assert weights[0] <= weights[1]  # what is not used any more is not carried along


def test_folding_first_and_casting_then_loses_no_more() -> None:
    images = pictures(3)
    graph = trace_operators(trained(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)), images)
    expected = graph(images)

    def off(low: fx.GraphModule) -> float:
        (found,) = in_precision(lambda batch: (low.to(torch.bfloat16)(batch),), "bfloat16")(images)
        return relative(found, expected)

    plain, better = off(copy.deepcopy(graph)), off(folded(graph))
    assert 0 < better < 1.2 * plain


def test_a_map_that_something_else_reads_is_left() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, images: Tensor) -> Tensor:
            found = self.convolution(images)
            return (self.norm(found) + found).mean(dim=(2, 3))  # type: ignore[no-any-return]

    images = pictures(2)
    graph = trace_operators(trained(Read()), images)
    made = folded(graph)
    assert normalisations(made) == 1
    assert torch.equal(made(images), graph(images))


def test_cuda_graphs_are_refused_where_there_is_no_cuda() -> None:
    images = pictures(2)
    with pytest.raises(EngineError, match="works only on NVIDIA GPUs, but the model runs on cpu; use eager"):
        make_trunk(trunk_of(pooled(), "features", images), "cudagraphs", "float32", images)


def test_a_compiled_trunk_gives_the_same() -> None:
    """One small network: compiling takes its time."""
    if not trunks._has_compiler():
        pytest.skip("torch.compile needs a C++ compiler, which is not on this machine")
    images = pictures(2)
    graph = trunk_of(pooled(), "features", images)
    trunk = make_trunk(graph, "compile", "float32", images)
    (found,) = trunk(images)
    assert found.dtype == torch.float32
    assert relative(found, graph(images)[0]) < 1e-5


def test_compile_without_a_compiler_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunks, "_has_compiler", lambda: False)
    with pytest.raises(EngineError, match=r"needs a C\+\+ compiler on this machine: install g\+\+, or use another"):
        make_trunk(trunk_of(pooled(), "features", pictures(2)), "compile", "float32", pictures(2))


def test_a_compiler_that_is_not_found_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise RuntimeError("InvalidCxxCompiler")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", fail)
    assert not trunks._has_compiler()


def test_without_openvino_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=r"openvino is not installed here: pip install 'wsi-gradcam\[engines\]'"):
        make_trunk(trunk_of(pooled(), "features", pictures(2)), "openvino", "float32", pictures(2))
    with pytest.raises(EngineError, match="not installed"):
        low_precisions("openvino", CPU)


def test_openvino_off_the_cpu_is_refused() -> None:
    with pytest.raises(EngineError, match="runs on the CPU, not on meta"):
        make_trunk(trunk_of(pooled(), "features", pictures(2)), "openvino", "float32", pictures(2).to("meta"))


def test_what_an_engine_cannot_run_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> trunks.Trunk:
        raise ZeroDivisionError("too\nmany things")

    monkeypatch.setattr(trunks, "_eager", fail)
    graph = trunk_of(pooled(), "features", pictures(2))
    with pytest.raises(EngineError, match="engine eager cannot run this model in float32: ZeroDivisionError: too many"):
        make_trunk(graph, "eager", "float32", pictures(2))


def test_numbers_that_cross_a_cut_keep_their_kind() -> None:
    """Indices in float32 could not be used as such behind the cut."""

    class Indexing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 4, stride=4)

        def forward(self, images: Tensor) -> Tensor:
            order = images.mean(dim=(2, 3)).argsort(dim=1)
            return self.layer(images).mean(dim=(2, 3)).gather(1, order)  # type: ignore[no-any-return]

    network, images = Indexing().eval(), pictures(3)
    trunk, head = cut_at(network, "layer", images)
    engines = ["eager", "openvino"] if "openvino" in sys.modules else ["eager"]
    for engine in engines:
        for precision in ("float32", "bfloat16"):
            values = make_trunk(trunk, engine, precision, images)(images)
            assert values[0].dtype == torch.float32
            assert not values[1].is_floating_point()
            if precision == "float32":
                assert relative(head(*values), network(images)) < 1e-5


@pytest.mark.parametrize(
    ("engine", "cpu", "openvinos", "expected"),
    [
        ("eager", {"avx512_bf16": True}, "", ("bfloat16",)),
        ("eager", {"amx_bf16": True}, "", ("bfloat16",)),
        ("eager", {"avx2": True}, "", ()),
        ("compile", {}, "", ()),
        ("openvino", {"amx_fp16": True}, "FP32 BF16 FP16 INT8", ("bfloat16", "float16")),
        ("openvino", {"avx512_fp16": True}, "FP32 BF16 FP16 INT8", ("bfloat16",)),
        ("openvino", {"amx_fp16": True}, "FP32 INT8", ()),
    ],
)
def test_low_precisions_are_those_the_machine_has_instructions_for(
    engine: str, cpu: dict[str, bool], openvinos: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Core:
        def get_property(self, device: str, name: str) -> object:
            assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return openvinos.split()

    monkeypatch.setattr(trunks, "_core", Core)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    assert low_precisions(engine, CPU) == expected


def test_an_old_pytorch_that_does_not_tell_has_no_low_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert low_precisions("eager", CPU) == ()


def test_importing_openvino_reports_to_nobody(openvino: None) -> None:
    code = (
        "import sys, torch\n"
        "from wsi_gradcam.cam.trunks import _core, _ov\n"
        "model = _ov().convert_model(torch.nn.ReLU(), example_input=torch.zeros(1, 2))\n"
        "_core().compile_model(model, 'CPU')\n"
        "print([m for m in sys.modules if m.startswith('openvino_telemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_openvino_gets_a_batch_in_slices(monkeypatch: pytest.MonkeyPatch, openvino: None) -> None:
    monkeypatch.setitem(trunks.SLICE, "float32", 4)
    shapes = []
    compile_model = trunks._core().__class__.compile_model

    def compiled(core: object, model: Any, *rest: Any) -> Any:
        shapes.append(tuple(model.inputs[0].shape))
        return compile_model(core, model, *rest)

    monkeypatch.setattr(trunks._core().__class__, "compile_model", compiled)
    images = pictures(10)
    graph = trunk_of(curved(), "features", images)
    trunk = make_trunk(graph, "openvino", "float32", images)
    assert relative(trunk(images)[0], graph(images)[0]) < 1e-5
    assert shapes == [(4, 3, 32, 24), (2, 3, 32, 24)]


def test_what_is_not_of_single_images_is_not_cut_in_slices(monkeypatch: pytest.MonkeyPatch, openvino: None) -> None:
    """Such as a value of the whole batch, or a table that only the head needs."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 4, stride=4)
            self.table = nn.Parameter(torch.randn(4, 4))

        def forward(self, images: Tensor) -> Tensor:
            table = self.table * images.amax()
            return self.layer(images).mean(dim=(2, 3)) @ table  # type: ignore[no-any-return]

    monkeypatch.setitem(trunks.SLICE, "float32", 2)
    network, images = Table().eval(), pictures(8)
    trunk, head = cut_at(network, "layer", images)
    assert relative(head(*make_trunk(trunk, "openvino", "float32", images)(images)), network(images)) < 1e-5


# What eager float32 gives for 8 patches or fewer can depend on the number of threads: oneDNN then shares the channels
# of a 1 x 1 convolution among them, with every setting that was tried (DenseNet, EfficientNet, ResNet-50).
STEADY = [("openvino", "float32"), ("openvino", "bfloat16"), ("eager", "float32"), ("eager", "bfloat16")]


# Each kind of block at each stage's own width, once or twice: deeper networks repeat them. With 4 patches instead of 32
# eager float32 differs for this DenseNet as it does for DenseNet-121, so that what threads can change is in here.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet, basic blocks": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5),
    "resnet, bottlenecks": lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5),
    "densenet": lambda: DenseNet(64, (2, 2, 2, 2), 64, num_classes=5),
    "convnext": lambda: ConvNeXt(
        [CNBlockConfig(96 << i, 192 << i if i < 3 else None, 1) for i in range(4)], num_classes=5
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_results_are_the_same_to_the_last_bit_on_one_thread_and_on_two(
    name: str, threads: None, openvino: None
) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    layer = find_layer(network, probe_images((64, 64)))
    layers = (Layer(layer, check_layer(network, layer, probe_images((64, 64)))),)
    images = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    differing = []
    for engine, precision in STEADY:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)  # read when the trunk is made
            program = make_program(network, layers, engine, precision, images)
            found = explain_batch(program, images, [Target("predicted"), Target("a", 1)], ["gradcam", "gradcam++"])
            results.append([found.logits, *found.cams.values()])
        if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
            differing.append((engine, precision))
    assert not differing
