"""Targets: the scalar of the output that is explained, as users name it and as a function of the logits.

Users give a class by name or index, `predicted`, `all`, a contrast of two classes, or `module:function`. Finer-CAM has
its own score: what distinguishes a class from those that the model considers similar.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from wsi_gradcam.errors import TargetError, one_line, picked
from wsi_gradcam.system.processes import module_file, searching

if TYPE_CHECKING:
    from torch import Tensor

    from wsi_gradcam.cam.methods import Score


PREDICTED, ALL = "predicted", "all"
# Without a target all classes are explained, unless there are so many that nobody would look at them.
MAX_DEFAULT_CLASSES = 10


@dataclass(frozen=True)
class Target:
    """The scalar that is explained: a logit, the difference of two, or a function of all logits.

    Attributes:
        label: its name in results.
        index: the class; None: each patch's own predicted class.
        minus: the class whose logit is subtracted, for a contrast.
        function: `module:function`, called with logits [B, K], returns [B]; index and minus do not count then.
        digest: sha256 of that module's file.
    """

    label: str
    index: int | None = None
    minus: int | None = None
    function: str | None = None
    digest: str = ""

    @property
    def is_class(self) -> bool:
        """True for the logit of one class, which has a probability."""
        return self.minus is None and self.function is None


def parse_targets(wanted: Sequence[str], classes: Sequence[str]) -> tuple[Target, ...]:
    """Return the targets that a user named; a class name goes before any other reading of the same spelling.

    >>> [(target.label, target.index) for target in parse_targets(["tumour", "0"], ["other", "tumour"])]
    [('tumour', 1), ('other', 0)]
    >>> [(target.index, target.minus) for target in parse_targets(["tumour-other"], ["other", "tumour"])]
    [(1, 0)]

    Raises:
        TargetError: a name that is not a class, an index out of range, or the same target twice.
    """
    every = [Target(name, i) for i, name in enumerate(classes)]
    if not wanted:
        return tuple(every) if len(classes) <= MAX_DEFAULT_CLASSES else (Target(PREDICTED),)
    targets: list[Target] = []
    for text in wanted:
        if text == ALL and ALL not in classes:
            targets += every
        else:
            targets.append(_parse(text, classes))
    labels = [target.label for target in targets]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise TargetError(f"target {', '.join(sorted(repeated))} is given more than once")
    return tuple(targets)


def check_trusted(targets: Sequence[Target], trusted: bool) -> None:
    """Refuse targets that are code without permission to run.

    Raises:
        TargetError: the message says how to give permission.
    """
    functions = [target.function for target in targets if target.function is not None]
    if functions and not trusted:
        raise TargetError(
            f"target {functions[0]} is not a class of the model but a function, which is code; if you trust its "
            "author, allow it with --trust-code (in Python: trust_code=True)"
        )


def _parse(text: str, classes: Sequence[str]) -> Target:
    index = _class(text, classes)
    if index is not None:
        return Target(classes[index], index)
    if text == PREDICTED:
        return Target(PREDICTED)
    for left, right in _halves(text, "-"):
        plus, minus = _class(left, classes), _class(right, classes)
        if plus is not None and minus is not None:
            if plus == minus:
                raise TargetError(
                    f"target {text!r} is a class minus itself, which is always 0; give two different classes"
                )
            return Target(f"{classes[plus]}-{classes[minus]}", plus, minus)
    if all(part.replace(".", "_").isidentifier() for part in text.split(":")) and text.count(":") == 1:
        return Target(text, function=text)
    shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    near = get_close_matches(text, classes, n=3)
    meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise TargetError(
        f"target {text!r} is not a class of the model; expected one of {shown}, an index below {len(classes)}, "
        f"{PREDICTED!r}, {ALL!r}, a contrast CLASS-CLASS, or module:function{meant}"
    )


def _class(text: str, classes: Sequence[str]) -> int | None:
    if (name := picked(text, classes)) is not None:
        return list(classes).index(name)
    return int(text) if text.isdecimal() and int(text) < len(classes) else None


def _halves(text: str, between: str) -> Iterator[tuple[str, str]]:
    """Yield all ways to split a text at a mark, which class names may contain too."""
    for i, letter in enumerate(text):
        if letter == between:
            yield text[:i].strip(), text[i + 1 :].strip()


def make_score(target: Target | Callable[[Tensor], Tensor], logits: Tensor) -> Score:
    """Return the explained scalar [B] as a function of logits [B, K], for a batch with these `logits`.

    The class of `predicted` is the one that `logits` predict, even if the score is later computed for other logits.

    Raises:
        TargetError: a function that cannot be imported.
    """
    if callable(target):
        return _checked(target, getattr(target, "__name__", "the target"))
    if target.function is not None:
        return _checked(load_function(target.function, target.digest), target.function)
    classes = classes_of(target, logits)
    import torch  # imported where there are logits; clients do without it

    rows = torch.arange(len(logits), device=logits.device)  # created there: a copy would wait for the forward pass
    if target.minus is not None:
        return lambda logits: logits[rows, classes] - logits[:, target.minus]
    return lambda logits: logits[rows, classes]


def score_of_bag(target: Target, logits: Tensor) -> Score:
    """Return a target as a function of logits [n, K]; `predicted` is the class of the bag with `logits` in all.

    Raises:
        TargetError: a class that the aggregator does not have.
    """
    if target.function is not None:
        return make_score(target, logits[None])
    index = int(logits.argmax()) if target.index is None else target.index
    if max(index, target.minus or 0) >= len(logits):
        raise TargetError(f"target {target.label!r} is out of range: the aggregator has {len(logits)} logits")
    if target.minus is None:
        return lambda given: given[:, index]
    return lambda given: given[:, index] - given[:, target.minus]


def classes_of(target: Target, logits: Tensor) -> Tensor:
    """Return the class [B] that each image is explained for."""
    predicted = logits.detach().argmax(dim=1)
    return predicted if target.index is None else predicted.new_full((len(logits),), target.index)


@cache
def load_function(path: str, digest: str = "") -> Callable[[Tensor], Tensor]:
    """Import `module:function`; the module is also looked for in the current folder, last.

    Raises:
        TargetError: there is none, or its file is not the one with `digest`.
    """
    if digest and function_digest(path) != digest:
        raise TargetError(
            f"target {path}: its file is not the one that the run was started with; use the same file everywhere"
        )
    module, _, name = path.partition(":")
    with searching([Path.cwd()]):
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
    """Return the sha256 of the file that holds `module:function`, without running it.

    Raises:
        TargetError: there is no such file.
    """
    with searching([Path.cwd()]):
        file = module_file(path.partition(":")[0])
    if file is None or not Path(file).is_file():
        raise TargetError(f"target {path!r} is neither a class of the model nor a module that can be found")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


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


GAMMA = 0.6  # the authors' setting for several classes; their function's own default is 1
COMPARED = 3


def finer_score(
    logits: Tensor,
    classes: Tensor,
    gamma: float = GAMMA,
    compared: int = COMPARED,
    differentiate_weights: bool = True,
) -> Score:
    """Return the score whose Grad-CAM is Finer-CAM, sum_d p_d (s_c - gamma s_d) / sum_d p_d.

    (Zhang 2025, arXiv 2501.11309.) c is the row's class, d the `compared` other classes (all others, if they are fewer)
    whose logits are nearest to s_c, the lower index first among equals, and p the softmax of all logits. p_d / sum p_d
    is taken as the softmax over the d alone, which cannot underflow. The d are those of `logits`, even if the score is
    later computed for other logits.

    As in the authors' code and pytorch-grad-cam the weights q_d = p_d / sum p_d are differentiated as well: class d
    weighs -gamma q_d (1 + s_d - sum q s), and a class more than 1 below that mean counts in favour of c. Without
    `differentiate_weights` they are constants, those of `logits`, and class d weighs -gamma q_d: the map is the
    weighted mean of the maps of s_c - gamma s_d, and with global average pooling and a linear layer its sum is the
    score less that of the biases. With two classes both are the same.

    Args:
        logits: [B, C], C of 2 or more.
        classes: the explained class of each row, int64 [B].
        gamma: how much of the similar classes' evidence is subtracted; 0 is Grad-CAM.
        compared: how many classes are compared with.
        differentiate_weights: as in the authors' code; otherwise they are constants.

    Raises:
        TargetError: there is only one logit, so there is nothing to compare with.
    """
    if logits.shape[1] < 2:
        raise TargetError("Finer-CAM compares a class with others, but the model has one logit; use gradcam")
    logits, own = logits.detach(), classes[:, None]
    distance = (logits - logits.gather(1, own)).abs().scatter(1, own, math.inf)
    nearest = distance.argsort(dim=1, stable=True)[:, : min(compared, logits.shape[1] - 1)]
    shares = logits.gather(1, nearest).softmax(dim=1)

    def score(logits: Tensor) -> Tensor:
        others = logits.gather(1, nearest)
        weights = others.softmax(dim=1) if differentiate_weights else shares
        return (weights * (logits.gather(1, own) - gamma * others)).sum(dim=1)

    return score
