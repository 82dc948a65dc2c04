"""Objects in pickles are never made: whatever the library that reads them asks for."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

FORCE, FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def tensors_only() -> Iterator[None]:
    """While it lasts, `torch.load` makes nothing but tensors and plain containers, in this process.

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
