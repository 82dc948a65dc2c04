"""Targets: which scalar of the output is explained, by class name, index, `predicted`, `all`, contrast or function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from wsi_gradcam.errors import TargetError

PREDICTED, ALL = "predicted", "all"
# Without a target all classes are explained, unless there are so many that nobody would look at them.
MOST_BY_DEFAULT = 10


@dataclass(frozen=True)
class Target:
    """What is explained: a logit, the difference of two, or what a function makes of all logits.

    Attributes:
        label: how results name it.
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
        """Whether it is the logit of one class, which has a probability."""
        return self.minus is None and self.function is None


def parse_targets(wanted: Sequence[str], classes: Sequence[str]) -> tuple[Target, ...]:
    """The targets for what a user wrote; a class name goes before any other reading of the same spelling.

    >>> [(target.label, target.index) for target in parse_targets(["tumour", "0"], ["other", "tumour"])]
    [('tumour', 1), ('other', 0)]
    >>> [(target.index, target.minus) for target in parse_targets(["tumour-other"], ["other", "tumour"])]
    [(1, 0)]

    Raises:
        TargetError: a name that is no class, an index out of range, or the same target twice.
    """
    every = [Target(name, i) for i, name in enumerate(classes)]
    if not wanted:
        return tuple(every) if len(classes) <= MOST_BY_DEFAULT else (Target(PREDICTED),)
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
                raise TargetError(f"target {text!r} is a class minus itself, which is always 0; name two classes")
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
    if text in classes:
        return list(classes).index(text)
    return int(text) if text.isdecimal() and int(text) < len(classes) else None


def _halves(text: str, between: str) -> Iterator[tuple[str, str]]:
    """All ways to cut a text at a mark; class names may hold the mark too."""
    for i, letter in enumerate(text):
        if letter == between:
            yield text[:i].strip(), text[i + 1 :].strip()
