"""A target as a function of logits: of its class, also when other logits come later; functions are checked."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wsi_gradcam.cam.targets import Target, classes_of, function_digest, load_function, make_score
from wsi_gradcam.errors import TargetError

LOGITS = torch.tensor([[1.0, 5.0, 2.0], [9.0, 3.0, 4.0]])
LATER = torch.tensor([[10.0, 20.0, 70.0], [40.0, 50.0, 30.0]])
CODE = """
def surprise(logits):
    return -logits.log_softmax(dim=1).amax(dim=1)

def wrong(logits):
    return logits

number = 3
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module with functions in the current folder."""
    path = tmp_path / "targets_of_a_user.py"
    path.write_text(CODE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    load_function.cache_clear()
    monkeypatch.delitem(sys.modules, "targets_of_a_user", raising=False)
    return path


@pytest.mark.parametrize(
    ("target", "expected", "later"),
    [
        (Target("b", 1), [5.0, 3.0], [20.0, 50.0]),
        (Target("c-a", 2, 0), [1.0, -5.0], [60.0, -10.0]),
        (Target("predicted"), [5.0, 9.0], [20.0, 40.0]),  # still classes 1 and 0, which are not the largest any more
    ],
)
def test_the_scalar_of_a_target(target: Target, expected: list[float], later: list[float]) -> None:
    score = make_score(target, LOGITS)
    assert score(LOGITS).tolist() == expected
    assert score(LATER).tolist() == later


def test_a_python_function_is_a_target() -> None:
    score = make_score(lambda logits: logits[:, 0] * logits[:, 1], LOGITS)
    assert score(LATER).tolist() == [200.0, 2000.0]


@pytest.mark.parametrize(
    "function", [lambda logits: logits, lambda logits: logits.sum(), lambda logits: 3.0, lambda logits: logits[:1, 0]]
)
def test_a_function_that_gives_no_number_an_image_is_refused(function: object) -> None:
    score = make_score(function, LOGITS)  # type: ignore[arg-type]
    with pytest.raises(
        TargetError, match=r"<lambda>: returned shape .* for logits of shape \(2, 3\), expected one number"
    ):
        score(LOGITS)


def test_the_class_of_each_image() -> None:
    assert classes_of(Target("predicted"), LOGITS).tolist() == [1, 0]
    assert classes_of(Target("c", 2), LOGITS).tolist() == [2, 2]


def test_the_gradient_of_a_score_is_of_its_classes_alone() -> None:
    logits = LOGITS.clone().requires_grad_(True)
    score = make_score(Target("b-c", 1, 2), logits)(logits)
    (gradient,) = torch.autograd.grad(score.sum(), logits)
    assert gradient.tolist() == [[0.0, 1.0, -1.0], [0.0, 1.0, -1.0]]


def test_a_function_of_a_module_in_the_current_folder(code: Path) -> None:
    path = "targets_of_a_user:surprise"
    digest = function_digest(path)
    assert digest == hashlib.sha256(code.read_bytes()).hexdigest()
    assert code.stem not in sys.modules  # the digest is had without running the code
    before = list(sys.path)
    score = make_score(Target(path, function=path, digest=digest), LOGITS)
    torch.testing.assert_close(score(LATER), -LATER.log_softmax(dim=1).amax(dim=1))
    assert sys.path == before


def test_another_file_than_the_one_the_run_began_with_is_refused(code: Path) -> None:
    path = "targets_of_a_user:surprise"
    digest = function_digest(path)
    code.write_text(CODE + "\n", encoding="utf-8")
    with pytest.raises(TargetError, match="its file is not the one that the run was started with"):
        make_score(Target(path, function=path, digest=digest), LOGITS)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("targets_of_a_user:missing", "cannot be imported .*AttributeError.*; expected module:function"),
        ("no_such_module:f", "cannot be imported .*No module named 'no_such_module'"),
        ("targets_of_a_user:number", "not a function of logits"),
    ],
)
def test_what_is_no_function_is_refused(code: Path, path: str, problem: str) -> None:
    with pytest.raises(TargetError, match=problem):
        load_function(path)


def test_code_that_raises_is_refused(code: Path) -> None:
    code.write_text("1 / 0", encoding="utf-8")
    with pytest.raises(TargetError, match="ZeroDivisionError"):
        load_function("targets_of_a_user:surprise")


@pytest.mark.parametrize("path", ["no_such_module:f", "sys:exit", "no.such.package:f"])
def test_a_module_without_a_file_has_no_digest(path: str) -> None:
    with pytest.raises(TargetError, match="neither a class of the model nor a module that can be found"):
        function_digest(path)


def test_a_function_of_a_module_that_gives_something_else_is_named(code: Path) -> None:
    path = "targets_of_a_user:wrong"
    score = make_score(Target(path, function=path), LOGITS)
    with pytest.raises(TargetError, match=r"targets_of_a_user:wrong: returned shape \(2, 3\)"):
        score(LOGITS)


def test_rows_are_each_images_own() -> None:
    def first(logits: Tensor) -> Tensor:
        return logits[:, 0]

    together = make_score(first, LOGITS)(LATER)
    assert together.tolist() == [float(make_score(first, LOGITS[i : i + 1])(LATER[i : i + 1])) for i in range(2)]
