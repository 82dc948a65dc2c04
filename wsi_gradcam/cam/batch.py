"""The number of patches in a forward pass that suits a machine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from wsi_gradcam.cam.engine import explain_batch
from wsi_gradcam.cam.program import EagerProgram
from wsi_gradcam.cam.tap import evaluating
from wsi_gradcam.cam.targets import PREDICTED, Target

if TYPE_CHECKING:
    from torch import nn

    from wsi_gradcam.cam.layout import Layer

# Powers of two: a span of 256 patches holds whole batches. For fewer than 16 eager float32 can depend on the number of
# threads (1 x 1 convolutions), and runs would not agree.
SMALLEST, LARGEST = 16, 256
GAIN = 1.05  # a batch twice as large must bring this much
MEMORY_SHARE = 0.5  # of what is free


def find_batch_size(module: nn.Module, layers: tuple[Layer, ...], images: Tensor) -> int:
    """A batch size: doubled as long as that brings speed and fits into half of the memory that is free.

    `images` [B, 3, H, W] are examples of the input. It is found with eager float32, the hungriest program.
    """
    program = EagerProgram(module, layers)
    best, best_rate = SMALLEST, 0.0
    size = SMALLEST
    while size <= LARGEST and _fits(module, images, size):
        try:
            rate = size / _seconds(program, images[:1].expand(size, *images.shape[1:]).contiguous())
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            break
        if rate < GAIN * best_rate:
            break
        best, best_rate, size = size, rate, size * 2
    return best


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice; allocators and engines raise plain RuntimeErrors too."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("can't allocate memory", "bad allocation", "bad_alloc", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _fits(module: nn.Module, images: Tensor, size: int) -> bool:
    """Whether a batch is likely to fit: a few of its largest layers at once, three to be safe."""
    return 3 * size * activation_bytes(module, images[:1]) <= MEMORY_SHARE * _free_bytes(images.device)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _seconds(program: EagerProgram, images: Tensor) -> float:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        explain_batch(program, images, [Target(PREDICTED)])
        if images.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def activation_bytes(module: nn.Module, image: Tensor) -> int:
    """The largest input plus output of any layer for one image [1, 3, H, W]."""
    largest = 0

    def record(part: nn.Module, args: tuple[Any, ...], output: object) -> None:
        nonlocal largest
        tensors = [t for t in (*args, output) if isinstance(t, Tensor)]
        largest = max(largest, sum(t.numel() * t.element_size() for t in tensors))

    handles = [part.register_forward_hook(record) for part in module.modules() if not list(part.children())]
    try:
        with evaluating(module), torch.no_grad():
            module(image)
    finally:
        for handle in handles:
            handle.remove()
    return largest
