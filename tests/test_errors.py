"""Every error is one of ours and the built-in a caller would catch; messages stay on one line."""

from __future__ import annotations

import inspect
import pickle

import pytest

from wsi_gradcam import errors
from wsi_gradcam.errors import MppError, SlideNotFoundError, SlideReadError, WsiGradcamError, one_line

OURS = [
    c
    for _, c in inspect.getmembers(errors, inspect.isclass)
    if issubclass(c, WsiGradcamError) and c is not WsiGradcamError
]
EXPECTED = {
    "ConfigError": ValueError,
    "SlideNotFoundError": FileNotFoundError,
    "SlideFormatError": ValueError,
    "SlideContentError": ValueError,
    "SlideAccessError": ConnectionError,
    "MppError": ValueError,
    "SlideReadError": OSError,
    "AnnotationError": ValueError,
    "DocumentError": ValueError,
    "MarkError": ValueError,
    "StainError": ValueError,
    "ModelError": ValueError,
    "BagSizeError": ValueError,
    "LayerError": ValueError,
    "EngineError": ValueError,
    "TargetError": ValueError,
    "StoreError": OSError,
    "ResultError": ValueError,
    "MissingPartError": FileNotFoundError,
    "FeatureError": ValueError,
    "UnknownNameError": LookupError,
    "ResumeError": ValueError,
    "TileError": LookupError,
    "NotShownError": LookupError,
    "OutsideError": PermissionError,
    "RangeError": ValueError,
    "WorkerError": RuntimeError,
    "DeviceError": RuntimeError,
    "SlideMemoryError": RuntimeError,
    "MissingExtraError": ImportError,
    "StoppedError": RuntimeError,
}


@pytest.mark.parametrize(("name", "builtin"), EXPECTED.items())
def test_caught_as_the_builtin_a_caller_expects(name: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(errors, name), (WsiGradcamError,))
    assert issubclass(getattr(errors, name), builtin)


def test_no_error_stands_outside_the_table() -> None:
    assert {c.__name__ for c in OURS} - {"SlideError"} == set(EXPECTED)


@pytest.mark.parametrize("error", OURS, ids=lambda c: c.__name__)
def test_survives_the_way_from_a_worker(error: type[WsiGradcamError]) -> None:
    back = pickle.loads(pickle.dumps(error("a.svs: what; mend")))
    assert type(back) is error
    assert str(back) == "a.svs: what; mend"


@pytest.mark.parametrize("error", [SlideNotFoundError, SlideReadError, MppError])
def test_message_is_kept_word_for_word(error: type[WsiGradcamError]) -> None:
    assert one_line(error("slide.svs: what; mend")) == "slide.svs: what; mend"


def test_lines_and_tabs_become_single_spaces() -> None:
    assert one_line(MppError("a\n  b\tc\r\nd")) == "a b c d"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("k"), "KeyError: 'k'"),
        (RuntimeError(), "RuntimeError"),
        (MppError(), "MppError"),
        (OSError(28, "No space left"), "OSError: [Errno 28] No space left"),
    ],
)
def test_says_the_type_where_the_message_alone_would_not_do(error: Exception, line: str) -> None:
    assert one_line(error) == line
