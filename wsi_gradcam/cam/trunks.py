"""Engines that run a model's trunk: eager PyTorch, torch.compile, CUDA graphs, OpenVINO.

A trunk is a graph, images float32 [B, 3, H, W] -> a tuple of tensors, the first of which is the layer's output. It
returns only values, so any inference engine can run it, in any precision.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights

from wsi_gradcam.errors import EngineError, one_line
from wsi_gradcam.models.graph import fixed_batch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import fx

Trunk = Callable[[Tensor], tuple[Tensor, ...]]
# Images that OpenVINO is given at once, each slice for some of the threads. All 32 for all threads are no faster
# (ResNet, VGG) or slower by up to a fifth (DenseNet-121, EfficientNet-B0), because their maps exceed the caches, and
# they take a hundred megabytes more.
SLICE = {"float32": 4, "bfloat16": 16, "float16": 16}
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TF32_CAPABILITY = (8, 0)  # NVIDIA GPUs from Ampere on
WARM_UP = 3  # passes before one is recorded, as PyTorch advises

_FLAGS = threading.RLock()  # torch's flags belong to the process
_SET: list[tuple[bool, bool]] = []  # what the open contexts have set, the innermost last: (on CUDA, TF32)


@contextmanager
def exact(device: torch.device | None = None, tf32: bool = False) -> Iterator[None]:
    """Make float32 mean IEEE float32 in this process, and sums reproducible, as a context that restores the flags.

    PyTorch lets cuDNN compute convolutions of float32 in TF32, with 10 bits of mantissa, unless it is told otherwise; a
    model's own code may do the same to matrix products. On a CUDA `device`, kernels with reproducible sums are chosen
    where they exist.

    Args:
        device: the device of the computation; None if only the precision matters.
        tf32: use TF32 where the hardware has it, for a trunk in the precision of that name.
    """
    with _FLAGS, ExitStack() as restored:
        on_cuda = device is not None and device.type == "cuda"
        if not _SET or _SET[-1] != (on_cuda, tf32):  # it takes a tenth of a millisecond
            _SET.append((on_cuda, tf32))
            restored.callback(_SET.pop)
            restored.callback(_set_float32, *_float32_flags())
            _set_float32("high" if tf32 else "highest", tf32, [("tf32" if tf32 else "ieee")] * 3 + ["ieee"] * 3)
            if on_cuda:
                _choose_repeatable(restored)
        yield


def _choose_repeatable(restored: ExitStack) -> None:
    """Choose CUDA kernels with reproducible sums until the stack is closed; torch warns once about others."""
    cudnn, fill = torch.backends.cudnn, torch.utils.deterministic
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    restored.callback(torch.use_deterministic_algorithms, modes[0], warn_only=modes[1])
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    for owner, name, value in (
        (cudnn, "benchmark", False),
        (cudnn, "deterministic", True),
        (fill, "fill_uninitialized_memory", False),  # takes time, and nothing here reads uninitialised memory
    ):
        restored.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)


def _float32_flags() -> tuple[str | None, bool | None, list[str]]:
    """Return torch's flags for float32: for matrix products, cuDNN and each operator; None where they contradict."""
    matmul = cudnn = None
    with suppress(RuntimeError):  # torch refuses to say where its older and newer flags were set to different things
        matmul = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        cudnn = bool(torch.backends.cudnn.allow_tf32)
    return matmul, cudnn, [operator.fp32_precision for operator in _operators()]


def _set_float32(matmul: str | None, cudnn: bool | None, precisions: Sequence[str]) -> None:
    """Set the flags that `_float32_flags` returns.

    The older ones come first, because they affect the newer ones, which are then set only if they differ, so that the
    two do not contradict each other.
    """
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    if cudnn is not None:
        torch.backends.cudnn.allow_tf32 = cudnn
    for operator, precision in zip(_operators(), precisions, strict=False):
        if _plain_name(operator.fp32_precision) != _plain_name(precision):
            operator.fp32_precision = precision


def _plain_name(precision: str) -> str:
    return "ieee" if precision == "none" else precision


@cache
def _operators() -> list[Any]:
    """Return operators with their own float32 precision, three of CUDA, three of the CPU; none before torch 2.9."""
    b = torch.backends
    if not hasattr(b.cuda.matmul, "fp32_precision"):
        return []
    cpu = b.mkldnn
    return [b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn]  # type: ignore[attr-defined]


def make_trunk(graph: fx.GraphModule, engine: str, precision: str, images: Tensor) -> Trunk:
    """Return the trunk `graph` on an engine, tried on `images` [B, 3, H, W]; its tensors are float32.

    Raises:
        EngineError: the engine is not installed here, or cannot run this model in this precision.
    """
    makers = {"eager": _eager, "compile": _compiled, "cudagraphs": _recorded, "openvino": _openvino}
    if precision == "tf32" and images.device.type != "cuda":
        raise EngineError(
            f"precision tf32 exists only on NVIDIA GPUs, but the model runs on {images.device}; use float32"
        )
    try:
        trunk = makers[engine](graph, precision, images)
        trunk(images)
    except EngineError:
        raise
    except Exception as error:  # compilers raise anything
        raise EngineError(f"engine {engine} cannot run this model in {precision}: {one_line(error)[:300]}") from error
    return trunk


def low_precisions(engine: str, device: torch.device) -> tuple[str, ...]:
    """Return the precisions below float32 that this machine has instructions for, by engine."""
    if device.type == "cuda":
        has_tf32 = torch.cuda.get_device_capability(device) >= TF32_CAPABILITY
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        able = {"tf32": has_tf32, "bfloat16": has_bfloat16, "float16": True}
        return tuple(name for name, fast in able.items() if fast)
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.9 on
    if engine == "openvino":
        capable = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        # Without AMX, its float16 is slower than float32 (54 instead of 84 patches/s, ResNet-18).
        wanted = (("bfloat16", "BF16", True), ("float16", "FP16", bool(known.get("amx_fp16"))))
        return tuple(name for name, short, fast in wanted if fast and short in capable)
    # PyTorch emulates bfloat16 where a CPU lacks it, slower than float32; its float16 convolutions are slow on all.
    return ("bfloat16",) if known.get("avx512_bf16") or known.get("amx_bf16") else ()


def _eager(graph: fx.GraphModule, precision: str, images: Tensor) -> Trunk:
    if precision == "float32":
        return lambda batch: _plain(graph(batch))
    return in_precision(lowered(graph, precision), precision)


def lowered(graph: fx.GraphModule, precision: str) -> fx.GraphModule:
    """Return a copy of a graph for a precision below float32, with batch normalisations folded before its cast."""
    return folded(graph).to(DTYPES[precision]).to(memory_format=torch.channels_last)


def in_precision(low: Callable[[Tensor], Sequence[Any]], precision: str) -> Trunk:
    """Return the trunk of a network whose weights are in a precision."""
    dtype = DTYPES[precision]

    def run(batch: Tensor) -> tuple[Tensor, ...]:
        with exact(batch.device, tf32=precision == "tf32"):
            values = low(batch.to(dtype, memory_format=torch.channels_last))
        return _plain(values)

    return run


CONVOLUTIONS = (torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default)


def folded(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a graph in which batch normalisations are folded into the convolutions before them.

    Weights are scaled in float32: when they are cast to fewer bits, each map is then rounded once rather than twice,
    and a pass over memory is saved. Float32 sums change in the last bits. Normalisations that use another's statistics
    are left alone, and so are those after maps that something else reads too.
    """
    graph = copy.deepcopy(graph)
    for norm in [n for n in graph.graph.nodes if n.target is torch.ops.aten.batch_norm.default]:
        convolution, gamma, beta, mean, variance, training, _, epsilon = norm.args[:8]
        if training or not _is_plain(convolution) or not all(_is_constant(a) for a in (gamma, beta, mean, variance)):
            continue
        source, *constants = (*convolution.args[:3], None)[:3]
        others = convolution.args[3:]
        values: list[Any] = [
            None if node is None else getattr(graph, node.target) for node in (*constants, mean, variance, gamma, beta)
        ]
        kernel, bias, mean, variance, scale, shift = values
        made = fuse_conv_bn_weights(kernel, bias, mean, variance, epsilon, scale, shift)
        with graph.graph.inserting_before(convolution):
            for name, value in zip(("weight", "bias"), made, strict=True):
                graph.register_buffer(f"_{norm.name}_{name}", value.detach())
            constants = [graph.graph.get_attr(f"_{norm.name}_{name}") for name in ("weight", "bias")]
        convolution.args = (source, *constants, *others)
        norm.replace_all_uses_with(convolution)
        graph.graph.erase_node(norm)
    graph.graph.eliminate_dead_code()
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in graph.named_buffers(recurse=False) if name not in used]:
        delattr(graph, name)
    graph.recompile()
    return graph


def _is_plain(node: Any) -> bool:
    """Return whether a node is a convolution with constant weights whose output only one normalisation reads."""
    return (
        _is_node(node)
        and node.target in CONVOLUTIONS
        and len(node.users) == 1
        and not node.kwargs
        and node.args[1].op == "get_attr"
        and _is_constant(node.args[2] if len(node.args) > 2 else None)
    )


def _is_node(value: Any) -> bool:
    return hasattr(value, "op") and hasattr(value, "users")


def _is_constant(value: Any) -> bool:
    return value is None or (_is_node(value) and value.op == "get_attr")


def _plain(values: Sequence[Any]) -> tuple[Any, ...]:
    """Return maps in float32; other values that pass a cut, such as indices and sizes, as they are."""
    floating = [isinstance(value, Tensor) and value.is_floating_point() for value in values]
    return tuple(v.float().contiguous() if is_map else v for v, is_map in zip(values, floating, strict=True))


def _compiled(graph: fx.GraphModule, precision: str, images: Tensor) -> Trunk:
    if images.device.type == "cpu" and not _has_compiler():
        raise EngineError("engine compile needs a C++ compiler on this machine: install g++, or use another --engine")
    low = (
        copy.deepcopy(graph).to(memory_format=torch.channels_last)
        if precision == "float32"
        else lowered(graph, precision)
    )
    run = in_precision(torch.compile(low, dynamic=False), precision)

    def quiet(batch: Tensor) -> tuple[Tensor, ...]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inductor's remarks about the machine
            return run(batch)

    return quiet


def _recorded(graph: fx.GraphModule, precision: str, images: Tensor) -> Trunk:
    """Return the trunk as a CUDA graph, whose hundreds of kernels are launched at once, not one by one by Python."""
    if images.device.type != "cuda":
        raise EngineError(
            f"engine cudagraphs works only on NVIDIA GPUs, but the model runs on {images.device}; use eager"
        )
    if fixed_batch(graph) not in (None, len(images)):
        raise EngineError("engine cudagraphs cannot record this model for batches of this size; use eager")
    run = _eager(graph, precision, images)
    recordings: dict[torch.Size, Recording] = {}

    def replay(batch: Tensor) -> tuple[Tensor, ...]:
        if batch.shape not in recordings:
            recordings.clear()  # each holds memory for all of its maps
            recordings[batch.shape] = Recording(run, batch)
        return recordings[batch.shape](batch)

    return replay


class Recording:
    """The kernels of a trunk for batches of one size, recorded once and replayed for each batch."""

    def __init__(self, run: Trunk, batch: Tensor) -> None:
        self._given = batch.clone()
        side = torch.cuda.Stream(batch.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(batch.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):  # libraries choose kernels and allocate workspaces, which cannot be recorded
                run(self._given)
        torch.cuda.current_stream(batch.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads copy patches meanwhile, which is not part of it.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._found = run(self._given)

    def __call__(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Return the trunk's tensors for a batch; the caller owns them."""
        self._given.copy_(batch)
        self._graph.replay()
        return tuple(value.clone() if isinstance(value, Tensor) else value for value in self._found)


def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return bool(get_cpp_compiler())
    except Exception:  # it raises an error if there is none
        return False


def _openvino(graph: fx.GraphModule, precision: str, images: Tensor) -> Trunk:
    if images.device.type != "cpu":
        raise EngineError(f"engine openvino runs on the CPU, not on {images.device}; use another --engine")
    core, threads = _core(), torch.get_num_threads()
    # Its converter turns sizes that the graph computes into numbers.
    sized = fixed_batch(graph) or any(node.target is torch.ops.aten.sym_size.int for node in graph.graph.nodes)
    at_once = SLICE[precision] if _is_by_image(graph, images) else None
    streams = max(1, min(threads, len(images) // at_once)) if at_once else 1
    requests: dict[torch.Size, list[Any]] = {}

    def made(batch: Tensor) -> list[Any]:
        """Compile for batches of one size, up to a tenth faster than for any size (ResNet-18)."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's remarks about constants
            example = batch if sized else batch[:1].expand(2, *batch.shape[1:])
            # Traced here, because the converter's own tracing spends most of its time running the network again and
            # again to check itself; its result is compared with the network's own maps, or at least tried, anyway.
            with torch.no_grad():
                traced = torch.jit.trace(graph, (example,), check_trace=False)  # type: ignore[no-untyped-call]
            model = _ov().convert_model(traced, example_input=(example,), input=[list(batch.shape)])
        hint = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[precision]
        compiled = core.compile_model(
            model, "CPU", {"INFERENCE_PRECISION_HINT": hint, "NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": threads}
        )
        # Requests that are waited for, not OpenVINO's queue, whose calls back into Python have deadlocked at its end.
        return [compiled.create_infer_request() for _ in range(streams)]

    def run(batch: Tensor) -> tuple[Tensor, ...]:
        parts = torch.split(batch.contiguous(), at_once or len(batch))
        found: list[list[Tensor]] = []
        at_work: deque[Any] = deque()  # requests, in the order of their parts
        try:
            for number, part in enumerate(parts):
                if len(at_work) == streams:
                    found.append(_outputs(at_work.popleft()))
                if part.shape not in requests:
                    requests[part.shape] = made(part)
                request = requests[part.shape][number % streams]
                request.start_async([part.numpy()], share_inputs=True)
                at_work.append(request)
            while at_work:
                found.append(_outputs(at_work.popleft()))
        finally:  # after an error, the others must end before they are used again
            for request in at_work:
                with suppress(Exception):
                    request.wait()
        return _plain([torch.cat(some) if len(some) > 1 else some[0] for some in zip(*found, strict=True)])

    return run


def _outputs(request: Any) -> list[Tensor]:
    """Wait for a request and copy its outputs: the next one writes into the same memory."""
    request.wait()
    return [torch.from_numpy(np.array(output.data)) for output in request.output_tensors]


def _is_by_image(graph: fx.GraphModule, images: Tensor) -> bool:
    """Return whether every output of the graph begins with the axis of images, so that batches can be cut."""
    if fixed_batch(graph) is not None:
        return False
    with torch.no_grad():
        found = [graph(images[:1].expand(n, *images.shape[1:])) for n in (2, 3)]
    return all(
        isinstance(value, Tensor) and value.ndim > 0 and len(value) == n
        for n, values in zip((2, 3), found, strict=True)
        for value in values
    )


def _ov() -> Any:
    try:
        with _without_telemetry():
            import openvino
    except ImportError as error:
        raise EngineError("engine openvino is not installed here: pip install 'wsi-gradcam[engines]'") from error
    return openvino


def _core() -> Any:
    return _ov().Core()


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Keep the import of OpenVINO from sending telemetry to its vendor, which hospitals would object to."""
    hidden = "openvino_telemetry" not in sys.modules
    if hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # makes its import fail
    try:
        yield
    finally:
        if hidden:
            del sys.modules["openvino_telemetry"]
