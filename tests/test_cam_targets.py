"""What a user writes as targets, also for classes with awkward names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_gradcam.cam.targets import MAX_DEFAULT_CLASSES, Target, parse_targets
from wsi_gradcam.errors import TargetError

CLASSES = ("other", "tumour", "in situ")
EVERY = tuple(Target(name, i) for i, name in enumerate(CLASSES))


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["tumour"], [Target("tumour", 1)]),
        (["2", "other"], [Target("in situ", 2), Target("other", 0)]),
        (["predicted", "in situ"], [Target("predicted"), Target("in situ", 2)]),
        (["all"], EVERY),
        (["all", "predicted"], [*EVERY, Target("predicted")]),
        (["tumour-other"], [Target("tumour-other", 1, 0)]),
        (["in situ - 0"], [Target("in situ-other", 2, 0)]),
        (["2-1", "1-2"], [Target("in situ-tumour", 2, 1), Target("tumour-in situ", 1, 2)]),
        (["a.module:function"], [Target("a.module:function", function="a.module:function")]),
    ],
)
def test_targets_are_names_indices_predicted_and_all(wanted: list[str], expected: list[Target]) -> None:
    assert parse_targets(wanted, CLASSES) == tuple(expected)


@pytest.mark.parametrize(
    "wanted",
    [
        ["tumor"],
        ["3"],
        ["-1"],
        ["1.0"],
        [""],
        ["Tumour"],
        ["²"],
        ["tumour", "nothing"],
        ["tumour-3"],
        ["-"],
        ["tumour-"],
        ["predicted-other"],
        ["a b:c"],
        ["a:b:c"],
        [":f"],
        ["m:"],
    ],
)
def test_what_is_no_class_is_refused_with_the_classes_there_are(wanted: list[str]) -> None:
    with pytest.raises(TargetError, match="expected one of other, tumour, in situ, an index below 3") as caught:
        parse_targets(wanted, CLASSES)
    assert repr(wanted[-1]) in str(caught.value)


def test_a_misspelt_class_is_guessed() -> None:
    with pytest.raises(TargetError, match=r"module:function; did you mean 'tumour'\?"):
        parse_targets(["tumor"], CLASSES)


@pytest.mark.parametrize("wanted", ["tumour-tumour", "1-tumour"])
def test_a_class_minus_itself_is_refused(wanted: str) -> None:
    with pytest.raises(TargetError, match="minus itself, which is always 0"):
        parse_targets([wanted], CLASSES)


def test_class_names_may_hold_the_marks_of_contrasts_and_functions() -> None:
    classes = ["non-tumour", "tumour", "non", "a:b"]
    assert parse_targets(["non-tumour", "a:b"], classes) == (Target("non-tumour", 0), Target("a:b", 3))
    assert parse_targets(["tumour-non-tumour"], classes) == (Target("tumour-non-tumour", 1, 0),)
    assert parse_targets(["non-tumour-non"], classes) == (Target("non-tumour-non", 0, 2),)


def test_only_the_logit_of_a_class_has_a_probability() -> None:
    found = parse_targets(["1", "predicted", "1-0", "m:f"], CLASSES)
    assert [target.is_class for target in found] == [True, True, False, False]


@pytest.mark.parametrize(
    "wanted", [["1", "tumour"], ["all", "other"], ["1-0", "tumour-other"], ["m:f", "m:f"], ["predicted", "predicted"]]
)
def test_the_same_target_twice_is_refused(wanted: list[str]) -> None:
    with pytest.raises(TargetError, match="given more than once"):
        parse_targets(wanted, CLASSES)


def test_a_class_named_like_an_index_goes_before_the_index() -> None:
    assert parse_targets(["0", "2"], ["1", "0", "x"]) == (Target("0", 1), Target("x", 2))


def test_classes_named_like_our_words_are_classes() -> None:
    classes = ["normal", "all", "predicted"]
    assert parse_targets(["predicted", "all"], classes) == (Target("predicted", 2), Target("all", 1))


def test_without_a_target_a_class_named_all_is_one_among_all() -> None:
    assert parse_targets([], ["normal", "all"]) == (Target("normal", 0), Target("all", 1))


@given(st.integers(1, 40))
def test_without_a_target_few_classes_are_all_explained_and_of_many_the_predicted(count: int) -> None:
    classes = ["predicted", *map(str, range(count - 1))]
    every = tuple(Target(name, i) for i, name in enumerate(classes))
    expected = every if count <= MAX_DEFAULT_CLASSES else (Target("predicted"),)
    assert parse_targets([], classes) == expected


@given(st.lists(st.text(min_size=1), min_size=1, max_size=12, unique=True), st.data())
def test_every_class_can_be_named(classes: list[str], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(classes) - 1))
    assert parse_targets([classes[index]], classes) == (Target(classes[index], index),)


def test_the_message_stays_short_with_a_thousand_classes() -> None:
    with pytest.raises(TargetError) as caught:
        parse_targets(["cat"], [str(i) for i in range(1000)])
    assert len(str(caught.value)) < 350
