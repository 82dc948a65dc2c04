"""A check and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from wsi_gradcam.errors import one_line

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Check:
    """What was looked at, whether it is "ok", "warn" or "fail", what was found, and how to mend it."""

    name: str
    status: str
    found: str
    mend: str = ""


def guarded(name: str, check: Callable[..., Iterable[Check]], *arguments: Any) -> Iterator[Check]:
    """The checks of `check(*arguments)`; what it raises is one that failed."""
    try:
        yield from check(*arguments)
    except Exception as error:  # a broken installation raises anything; the other checks go on
        yield Check(name, FAIL, one_line(error), "the message says what is missing or broken")


def shown(check: Check) -> str:
    """A check on one line, its mend behind it."""
    return f"{check.status:>4}  {check.name}: {check.found}{f' -> {check.mend}' if check.mend else ''}"


def worst(checks: Iterable[Check]) -> str:
    """The gravest status of all."""
    return max((check.status for check in checks), key=(OK, WARN, FAIL).index, default=OK)
