"""Targets as functions of the logits."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from wsi_gradcam.errors import TargetError, one_line

if TYPE_CHECKING:
    from torch import Tensor

    from wsi_gradcam.cam.probe import Score
    from wsi_gradcam.cam.targets import Target


def make_score(target: Target | Callable[[Tensor], Tensor], logits: Tensor) -> Score:
    """The explained scalar [B] as a function of logits [B, K], for a batch that was answered with `logits`.

    The class of `predicted` is the one that `logits` predict, also when the score is asked of other logits later.

    Raises:
        TargetError: a function that cannot be imported.
    """
    if callable(target):
        return _checked(target, getattr(target, "__name__", "the target"))
    if target.function is not None:
        return _checked(load_function(target.function, target.digest), target.function)
    classes = classes_of(target, logits)
    rows = classes.new_tensor(range(len(logits)))
    if target.minus is not None:
        return lambda answer: answer[rows, classes] - answer[:, target.minus]
    return lambda answer: answer[rows, classes]


def classes_of(target: Target, logits: Tensor) -> Tensor:
    """The class [B] that each image is explained for."""
    predicted = logits.detach().argmax(dim=1)
    return predicted if target.index is None else predicted.new_full((len(logits),), target.index)


@cache
def load_function(path: str, digest: str = "") -> Callable[[Tensor], Tensor]:
    """The function `module:function`; the module is also looked for in the current folder.

    Raises:
        TargetError: there is none, or its file is not the one with `digest`.
    """
    if digest and function_digest(path) != digest:
        raise TargetError(f"target {path}: another file than the one the run began with; make it the same everywhere")
    module, _, name = path.partition(":")
    with _current_folder():
        try:
            function = getattr(importlib.import_module(module), name)
        except Exception as error:  # the module's own code may raise anything
            raise TargetError(
                f"target {path}: cannot be imported ({one_line(error)}); expected module:function"
            ) from error
    if not callable(function):
        raise TargetError(f"target {path}: not a function of logits [B, K]")
    return function  # type: ignore[no-any-return]


def function_digest(path: str) -> str:
    """sha256 of the file that holds `module:function`, without running it.

    Raises:
        TargetError: there is no such file.
    """
    with _current_folder():
        try:
            found = importlib.util.find_spec(path.partition(":")[0])
        except (ImportError, ValueError):
            found = None
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise TargetError(f"target {path!r}: neither a class of the model nor a module that can be found here")
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()


def _checked(function: Callable[[Tensor], Tensor], name: str) -> Score:
    def score(logits: Tensor) -> Tensor:
        value = function(logits)
        if getattr(value, "shape", None) != logits.shape[:1]:
            raise TargetError(
                f"target {name}: returned shape {tuple(getattr(value, 'shape', ()))} for logits of shape "
                f"{tuple(logits.shape)}, expected one number per image"
            )
        return value

    return score


@contextmanager
def _current_folder() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
