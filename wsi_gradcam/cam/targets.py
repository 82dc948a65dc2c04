"""Targets: which scalar of the output is explained, by class name, index, `predicted` or `all`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wsi_gradcam.errors import TargetError

PREDICTED, ALL = "predicted", "all"
# Without a target all classes are explained, unless there are so many that nobody would look at them.
MOST_BY_DEFAULT = 10


@dataclass(frozen=True)
class Target:
    """A logit: of the class with `index`, or of each patch's own predicted class when `index` is None."""

    label: str
    index: int | None


def parse_targets(wanted: Sequence[str], classes: Sequence[str]) -> tuple[Target, ...]:
    """The targets for what a user wrote; a class name goes before an index of the same spelling.

    >>> parse_targets(["tumour", "0"], ["other", "tumour"])
    (Target(label='tumour', index=1), Target(label='other', index=0))

    Raises:
        TargetError: a name that is no class, an index out of range, or the same target twice.
    """
    every = [Target(name, i) for i, name in enumerate(classes)]
    if not wanted:
        return tuple(every) if len(classes) <= MOST_BY_DEFAULT else (Target(PREDICTED, None),)
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
    if text in classes:
        return Target(text, list(classes).index(text))
    if text == PREDICTED:
        return Target(PREDICTED, None)
    if text.isdecimal() and int(text) < len(classes):
        return Target(classes[int(text)], int(text))
    shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    raise TargetError(
        f"target {text!r} is not a class of the model; expected one of {shown}, an index below {len(classes)}, "
        f"{PREDICTED!r} or {ALL!r}"
    )
