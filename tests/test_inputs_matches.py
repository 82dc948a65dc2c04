"""Patterns: wildcards stay in their folder, `**` goes through all, and what cannot match is not searched."""

from __future__ import annotations

import re
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from wsi_gradcam.inputs.search import matches, may_contain, parts_of_pattern, split_pattern

parts = st.sampled_from(["a", "b", "ab", "a.svs", "b.svs"])
pieces = st.sampled_from(["a", "*", "?", "a*", "[ab]", "*.svs", "**", "b"])


def as_expression(pattern: list[str]) -> re.Pattern[str]:
    """The pattern as a regular expression on "part/part/", each part with its slash."""
    signs = {"*": "[^/]*", "?": "[^/]", "[ab]": "[ab]", ".": r"\."}
    texts = []
    for part in pattern:
        found = re.findall(r"\[ab\]|.", part)
        texts.append("(?:[^/]*/)*" if part == "**" else "".join(signs.get(sign, sign) for sign in found) + "/")
    return re.compile("".join(texts))


@given(st.lists(parts, min_size=1, max_size=4), st.lists(pieces, min_size=1, max_size=4))
@example(["a", "b", "a.svs"], ["**", "*.svs"])
def test_a_pattern_matches_what_its_expression_matches(name: list[str], pattern: list[str]) -> None:
    assert matches(name, pattern) == (as_expression(pattern).match("".join(f"{part}/" for part in name)) is not None)


@given(st.lists(parts, min_size=1, max_size=4), st.lists(pieces, min_size=1, max_size=4))
def test_no_folder_is_left_out_that_holds_a_match(name: list[str], pattern: list[str]) -> None:
    if matches(name, pattern):
        assert all(may_contain(name[:depth], pattern) for depth in range(len(name)))


def test_folders_that_cannot_match_are_not_searched() -> None:
    assert not may_contain(["2022"], ["2023", "*.svs"])
    assert not may_contain(["2023", "x"], ["2023", "*.svs"])
    assert may_contain(["2023", "x"], ["2023", "**", "*.svs"])


def test_a_slash_at_the_end_changes_nothing() -> None:
    assert parts_of_pattern("case/") == parts_of_pattern("./case") == ("case",)


def test_the_root_is_what_stands_before_the_first_wildcard(tmp_path: Path) -> None:
    (tmp_path / "a[1]").mkdir()
    assert split_pattern(tmp_path / "x" / "*.svs") == (tmp_path / "x", ("*.svs",))
    assert split_pattern(Path("x/**/y")) == (Path("x"), ("**", "y"))
    assert split_pattern(tmp_path / "a[1]" / "b?.svs") == (tmp_path / "a[1]", ("b?.svs",))
    assert split_pattern(tmp_path / "a[2]" / "b.svs") == (tmp_path, ("a[2]", "b.svs"))
    assert split_pattern(tmp_path / "a[1]" / "b.svs")[1] == ()
