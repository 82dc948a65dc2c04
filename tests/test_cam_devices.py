"""Tensors of a GPU never meet those of another device, and between the first copy and the last there is none.

A copy in the middle would wait for all that the device has been given, and the device for what comes after it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import fake_gpu
from tests.fake_gpu import GRADIENT, NETWORKS, PROBING, SMALL, Copies
from tests.runs import ROOT
from wsi_gradcam.cam.methods import METHODS


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What a process with a GPU that is not there says; it registers the device, which cannot be undone."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("torch has no devices written in Python yet")
    done = subprocess.run(
        [sys.executable, "-m", fake_gpu.__name__], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


@pytest.mark.parametrize("name", NETWORKS)
def test_a_batch_stays_on_its_device(name: str, found: dict[str, Any]) -> None:
    """By all methods of the gradient, eager and cut in two, in all precisions."""
    assert found[name] == {}


@pytest.mark.parametrize("method", [*GRADIENT, *PROBING])
@pytest.mark.parametrize("name", SMALL)
def test_methods_stay_there_too(name: str, method: str, found: dict[str, Any]) -> None:
    """But for SmoothGrad's noise, which comes from the CPU to be the same on every device."""
    copies, float64 = found[f"methods of {name}"][method]
    assert copies == (25 if method == "smoothgrad" else 0)
    assert (float64 > 0) == (method == "eigencam")


def test_devices_that_meet_are_found(found: dict[str, Any]) -> None:
    """The tests above would see it."""
    assert "two devices" in found["mixed"]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "cam"])
def test_apples_gpus_which_have_no_float64_are_given_none(method: str) -> None:
    """`cam` looks at values in the middle, which a fake tensor does not have."""
    copies = Copies()
    with FakeTensorMode(allow_non_fake_inputs=False), copies:
        A, g = (torch.empty(2, 5, 4, 3, device="mps") for _ in range(2))
        cams = METHODS[method](A, g)
    assert (cams.device.type, cams.dtype) == ("mps", torch.float32)
    assert copies.float64.total() == 0
