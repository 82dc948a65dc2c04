"""The batch that is found is one that helps and fits; what says that memory does not suffice is known."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from tests.toy_models import PooledLinear, pooled_linear
from wsi_gradcam.cam import engine
from wsi_gradcam.cam.engine import MAX_BATCH, MIN_BATCH, activation_bytes, find_batch_size
from wsi_gradcam.cam.facts import Layer, Layout
from wsi_gradcam.cam.program import EagerProgram
from wsi_gradcam.errors import DeviceError, ModelError, device_errors, is_out_of_memory, lost_device
from wsi_gradcam.run.failures import is_lasting, is_transient

ACCELERATOR: type[Exception] = getattr(torch, "AcceleratorError", RuntimeError)

LAYERS = (Layer("features", Layout("bkhw", 12, 4, 4)),)
IMAGES = torch.zeros(2, 3, 32, 32)


def timing(monkeypatch: pytest.MonkeyPatch, per_s: dict[int, float]) -> list[int]:
    """Passes take the time that gives `per_s` patches a second for each batch size; returns the sizes tried."""
    tried: list[int] = []

    def seconds(program: EagerProgram, images: Tensor) -> float:
        tried.append(len(images))
        if per_s[len(images)] == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return len(images) / per_s[len(images)]

    monkeypatch.setattr(engine, "_seconds", seconds)
    return tried


@pytest.mark.parametrize(
    ("per_s", "found"),
    [
        ({16: 20, 32: 40, 64: 41}, 32),  # a gain of less than 5 % ends it
        ({16: 10, 32: 9}, 16),
        ({16: 20, 32: 40, 64: 80, 128: 160, 256: 320}, 256),
        ({16: 20, 32: 40, 64: 0}, 32),  # out of memory
        ({16: 0}, 16),
    ],
)
def test_batches_grow_as_long_as_that_brings_speed(
    per_s: dict[int, float], found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = timing(monkeypatch, per_s)
    assert find_batch_size(pooled_linear().eval(), LAYERS, IMAGES) == found
    assert tried == list(per_s)


@pytest.mark.parametrize("times", [1, 4, 9])
def test_batches_grow_into_half_of_the_free_memory_alone(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = pooled_linear().eval()
    each = 3 * activation_bytes(network, IMAGES[:1])
    monkeypatch.setattr(engine, "_free_bytes", lambda device: 2 * each * MIN_BATCH * times)
    timing(monkeypatch, {16 * 2**i: 10.0 * 2**i for i in range(5)})
    assert find_batch_size(network, LAYERS, IMAGES) == {1: 16, 4: 64, 9: 128}[times]


def test_the_smallest_batch_is_the_answer_where_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_free_bytes", lambda device: 0)
    assert find_batch_size(pooled_linear().eval(), LAYERS, IMAGES) == MIN_BATCH


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(program: EagerProgram, images: Tensor) -> float:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(engine, "_seconds", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        find_batch_size(pooled_linear().eval(), LAYERS, IMAGES)


def test_a_real_network_has_a_batch_of_a_power_of_two() -> None:
    found = find_batch_size(pooled_linear().eval(), LAYERS, IMAGES)
    assert MIN_BATCH <= found <= MAX_BATCH
    assert found & (found - 1) == 0


def test_activation_bytes_are_of_the_largest_layer_in_evaluation_mode() -> None:
    network = cast(PooledLinear, pooled_linear())
    first, second = 4 * (3 * 32 * 32 + 8 * 8 * 8), 4 * (8 * 8 * 8 * 2)
    assert first > second
    assert activation_bytes(network, IMAGES[:1]) == first
    assert network.training
    assert not any(part._forward_hooks for part in network.modules())


def test_an_exception_leaves_no_hook() -> None:
    network = nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU())
    with pytest.raises(RuntimeError, match="channels"):
        activation_bytes(network, IMAGES[:1])
    assert not any(part._forward_hooks for part in network.modules())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        MemoryError("std::bad_alloc"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to ..."
        ),
        RuntimeError("Exception from src/inference/src/cpp/infer_request.cpp:224: std::bad_alloc"),
        RuntimeError("bad allocation"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB, max allowed: 18.1 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:83] data. DefaultCPUAllocator: not enough memory: you tried to"),
        ACCELERATOR("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    ],
)
def test_a_lack_of_memory_is_recognised(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert lost_device(error) is None
    assert is_transient(error)  # another process may have had it
    assert not is_lasting(error)


def test_a_real_lack_of_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes"), ValueError("bad allocation"), OSError("can't allocate memory")]
)
def test_other_errors_are_no_lack_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)
    assert lost_device(error) is None


def wrapped(error: Exception) -> Exception:
    """An error of ours, raised because of another."""
    try:
        raise ModelError("engine eager cannot run this model") from error
    except ModelError as caught:
        return caught


@pytest.mark.parametrize(
    "error",
    [
        ACCELERATOR("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ..."),
        ACCELERATOR("HIP error: invalid configuration argument"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: unspecified launch failure"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
)
def test_errors_after_which_a_gpu_is_of_no_use_are_recognised(error: Exception) -> None:
    for found in (error, wrapped(error), wrapped(wrapped(error))):
        assert lost_device(found) is error
        assert not is_out_of_memory(found)
        with (
            pytest.raises(DeviceError, match="no slide is at fault; run the same command again") as caught,
            device_errors(),
        ):
            raise found
        assert not is_transient(caught.value)  # in this process nothing can be done again


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        RuntimeError("CUDA error: invalid device ordinal"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("CUDA error: quoted in a file"),
    ],
)
def test_other_errors_leave_a_gpu_as_it_was(error: Exception) -> None:
    assert lost_device(wrapped(error)) is None
    with pytest.raises(type(error)), device_errors():
        raise error
