"""What was freed goes back to the system, and where that cannot be asked for nothing happens."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import psutil
import pytest
import torch

from wsi_gradcam.system import processes


@pytest.mark.skipif(sys.platform != "linux", reason="other allocators cannot be asked")
def test_freed_memory_goes_back() -> None:
    process = psutil.Process()
    blocks = [np.ones(1 << 16, np.uint8) for _ in range(2000)]  # 125 MiB in pieces that the allocator keeps
    last = np.ones(1 << 16, np.uint8)  # above them, so that they are not the end of the heap
    full = process.memory_info().rss
    del blocks
    processes.release_freed_memory()
    assert full - process.memory_info().rss > 100 << 20
    assert last.all()


@pytest.mark.skipif(sys.platform != "linux", reason="other allocators cannot be asked")
def test_freed_tiles_are_used_again() -> None:
    """Pages that the system must clear, for arrays of a tile's size made and dropped again and again."""
    code = (
        "import resource, numpy as np; from wsi_gradcam.system import processes;"
        "processes.keep_freed_memory() if {} else None;"
        "some = lambda: [np.ones(200_000, np.uint8) for _ in range(100)]; some();"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt; [len(some()) for _ in range(5)];"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    dropped, kept = (
        int(subprocess.run([sys.executable, "-c", code.format(keep)], capture_output=True, check=True).stdout)
        for keep in (False, True)
    )
    assert kept < dropped / 20


@pytest.mark.skipif(sys.platform != "linux", reason="other allocators cannot be asked")
def test_threads_share_arenas() -> None:
    """In a process of its own: each thread takes 64 MiB of addresses for an arena that is its alone."""
    code = (
        "import sys, threading, psutil; from wsi_gradcam.system.processes import limit_arenas;"
        "limit_arenas() if {} else None;"
        "held, barrier = [], threading.Barrier(13);"
        "work = lambda: (held.append(bytes(1000)), barrier.wait());"
        "[threading.Thread(target=work).start() for _ in range(12)];"
        "print(psutil.Process().memory_info().vms >> 20); barrier.wait()"
    )
    apart, shared = (
        int(subprocess.run([sys.executable, "-c", code.format(share)], capture_output=True, check=True).stdout)
        for share in (False, True)
    )
    assert apart - shared > 5 * 64


def test_where_the_allocator_cannot_be_asked_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    processes.release_freed_memory()
    processes.limit_arenas()
    processes.keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: 1 / 0)
    processes.release_freed_memory()
    processes.limit_arenas()
    processes.keep_freed_memory()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs its compiler")
@pytest.mark.skipif(find_spec("triton") is None, reason="not installed with this torch")
def test_a_model_of_torchvision_does_not_bring_the_compiler_of_gpus() -> None:
    code = (
        "import sys; from wsi_gradcam.models.load import load_model; from wsi_gradcam.models.spec import ModelSpec;"
        "load_model(ModelSpec(name='r', source='torchvision:resnet18', weights='random', classes=('a', 'b'), "
        "patch_px=(64, 64), mpp=0.5));"
        "print('torch._dynamo' in sys.modules, 'triton' in sys.modules); import triton"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert found.stdout.split() == ["True", "False"]
