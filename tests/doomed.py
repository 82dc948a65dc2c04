"""Runs in processes that are killed: `runs.start` forks them from a server that has imported this module."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import torch  # noqa: F401 - imported once, by the server
import zarr  # noqa: F401

from tests.runs import SMALL, toy_spec
from tests.toy_models import SLOWNESS_S
from wsi_gradcam.api import explain

CHANGES = ("replace", "unlink", "rmdir")  # functions of `os` through which every change of a result goes


def is_by_clock(*arguments: object) -> bool:
    """Return True for files that are renewed every few seconds, however far a run is."""
    return any(name in str(each) for each in arguments for name in ("status.json", "claim.json"))


def explain_and_die(
    slides: list[str], model: str, out: str, die_at_change: int | None, slowness_s: float, environment: dict[str, str]
) -> None:
    """Explains slides; with `die_at_change`, until so many files have been put in place or deleted."""
    os.environ.update(environment, **{SLOWNESS_S: str(slowness_s)})
    if die_at_change is not None:
        _die_at(die_at_change)
    explain(slides, model if model.endswith(".yaml") else toy_spec(model), out, trust_code=True, **SMALL)


def _die_at(change: int) -> None:
    """The package and zarr write a file beside its place, then rename it: count renames and deletions."""
    left = change

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if is_by_clock(*args):
                return function(*args, **kwargs)
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*args, **kwargs)

        return called

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
