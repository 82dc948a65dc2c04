"""Environment variables that PyTorch and its libraries obey: deterministic sums, and no objects from pickles."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def make_sums_deterministic() -> None:
    """Ask MKL for matrix products that do not depend on the number of threads; call before torch is first used.

    Workers have fewer threads than a single process, and results must agree to the last bit: with MKL's default,
    VGG-11's logits differ between 1 and 2 threads. STRICT mode exists for AVX2 and later; elsewhere MKL falls back
    to its compatible mode. Convolutions do not go through MKL; they agree where batches have the same size.
    """
    os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")


FORCE, FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def tensors_only() -> Iterator[None]:
    """Allow `torch.load` to make nothing but tensors and plain containers, in this process.

    torchvision, `torch.export.load` and others call it with `weights_only=False`; PyTorch's own environment variable
    goes before what they say. Other threads that load a pickled model meanwhile would be refused, which is the safe
    side.
    """
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORBID)}
    os.environ[FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})
