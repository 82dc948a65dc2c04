"""Engines that run a model's trunk: eager PyTorch, torch.compile, OpenVINO.

A trunk is a graph, images float32 [B, 3, H, W] -> a tuple of tensors, of which the layer's output is the first.
Only values come out of it, so any inference engine may run it, in any precision.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wsi_gradcam.errors import EngineError, one_line
from wsi_gradcam.models.graph import fixed_batch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import fx

Trunk = Callable[[Tensor], tuple[Tensor, ...]]
# Images that OpenVINO is handed at once, each slice for some of the threads. All of 32 for all threads are no faster
# (ResNet, VGG) or slower by up to a fifth (DenseNet-121, EfficientNet-B0), because their maps leave the caches, and
# take a hundred megabytes more.
SLICE = {"float32": 4, "bfloat16": 16, "float16": 16}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_trunk(graph: fx.GraphModule, engine: str, precision: str, images: Tensor) -> Trunk:
    """Return the trunk `graph` on an engine, tried on `images` [B, 3, H, W]; its tensors are float32.

    Raises:
        EngineError: the engine is not installed here, or cannot run this model in this precision.
    """
    makers = {"eager": _eager, "compile": _compiled, "openvino": _openvino}
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
        return ("bfloat16", "float16") if torch.cuda.is_bf16_supported() else ("float16",)
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.9 on
    if engine == "openvino":
        capable = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        # Without AMX its float16 is slower than float32 (54 against 84 patches/s, ResNet-18).
        wanted = (("bfloat16", "BF16", True), ("float16", "FP16", bool(known.get("amx_fp16"))))
        return tuple(name for name, short, fast in wanted if fast and short in capable)
    # PyTorch emulates bfloat16 where a CPU lacks it, slower than float32; its float16 convolutions are slow on all.
    return ("bfloat16",) if known.get("avx512_bf16") or known.get("amx_bf16") else ()


def _eager(graph: fx.GraphModule, precision: str, images: Tensor) -> Trunk:
    if precision == "float32":
        return lambda batch: _plain(graph(batch))
    dtype = DTYPES[precision]
    low = copy.deepcopy(graph).to(dtype).to(memory_format=torch.channels_last)

    def run(batch: Tensor) -> tuple[Tensor, ...]:
        values = low(batch.to(dtype, memory_format=torch.channels_last))
        return _plain(values)

    return run


def _plain(values: Sequence[Any]) -> tuple[Any, ...]:
    """Return maps in float32; other values that pass a cut, such as indices and sizes, as they are."""
    floating = [isinstance(value, Tensor) and value.is_floating_point() for value in values]
    return tuple(v.float().contiguous() if is_map else v for v, is_map in zip(values, floating, strict=True))


def _compiled(graph: fx.GraphModule, precision: str, images: Tensor) -> Trunk:
    if images.device.type == "cpu" and not _has_compiler():
        raise EngineError("engine compile needs a C++ compiler on this machine: install g++, or use another --engine")
    dtype = DTYPES[precision]
    low = copy.deepcopy(graph).to(dtype).to(memory_format=torch.channels_last)
    compiled = torch.compile(low, dynamic=False)

    def run(batch: Tensor) -> tuple[Tensor, ...]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inductor's remarks on the machine
            values = compiled(batch.to(dtype, memory_format=torch.channels_last))
        return _plain(values)

    return run


def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return bool(get_cpp_compiler())
    except Exception:  # it raises where there is none
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
        """Compile for batches of one size, up to a tenth faster than where any size is allowed (ResNet-18)."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's remarks on constants
            example = batch if sized else batch[:1].expand(2, *batch.shape[1:])
            # Traced here, because the converter's own tracing runs the network again and again to check itself,
            # most of its time; what comes out is compared with the network's own maps or at least tried anyway.
            with torch.no_grad():
                traced = torch.jit.trace(graph, (example,), check_trace=False)  # type: ignore[no-untyped-call]
            model = _ov().convert_model(traced, example_input=(example,), input=[list(batch.shape)])
        hint = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[precision]
        compiled = core.compile_model(
            model, "CPU", {"INFERENCE_PRECISION_HINT": hint, "NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": threads}
        )
        # Requests that are waited for, not OpenVINO's queue: its calls back into Python have deadlocked when it ended.
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
        finally:  # after an error the others must end before they are used again
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
    """Keep the import of OpenVINO from reporting itself to its maker; hospitals would mind."""
    hidden = "openvino_telemetry" not in sys.modules
    if hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # makes its import fail
    try:
        yield
    finally:
        if hidden:
            del sys.modules["openvino_telemetry"]
