"""Patterns in place of paths, `only` and `skip`, and archives of many slides."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli_runs import SMALL_FLAGS, calling, only_error, write_inputs
from tests.listings import ids, touch
from tests.runs import SMALL, rows_of
from wsi_gradcam.api import explain, preview
from wsi_gradcam.errors import ConfigError, SlideNotFoundError
from wsi_gradcam.inputs.find import SlideEntry, choose_slides, find_slides


class TestPatternsAsPaths:
    @pytest.fixture
    def archive(self, tmp_path: Path) -> Path:
        touch(
            tmp_path,
            "top.svs",
            "2022/a.svs",
            "2023/a.svs",
            "2023/x/b.svs",
            "2023/x/c.tif",
            "2023/x/d.png",
            "2023/readme",
        )
        touch(tmp_path, "2023/._a.svs", "2023/old.zarr/e.svs")
        return tmp_path

    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("**/*.svs", ["2022/a.svs", "2023/a.svs", "2023/x/b.svs", "top.svs"]),
            ("*.svs", ["top.svs"]),
            ("*/a.svs", ["2022/a.svs", "2023/a.svs"]),
            ("202[3-9]", ["2023/a.svs", "2023/x/b.svs", "2023/x/c.tif"]),
            ("2023*/**", ["2023/a.svs", "2023/x/b.svs", "2023/x/c.tif"]),
            ("2023/x/?.*", ["2023/x/b.svs", "2023/x/c.tif"]),
            ("**/*.png", ["2023/x/d.png"]),
        ],
    )
    def test_what_matches_is_found_and_named_from_the_folder_before(
        self, archive: Path, pattern: str, expected: list[str]
    ) -> None:
        found = find_slides([archive / pattern])
        assert [Path(slide.path).relative_to(archive).as_posix() for slide in found] == expected

    def test_names_start_at_the_first_wildcard(self, archive: Path) -> None:
        assert ids(archive / "2023" / "**" / "*.svs") == ["a.svs", "x/b.svs"]
        assert ids(archive / "202?" / "a.svs") == ["2022/a.svs", "2023/a.svs"]

    def test_what_is_called_so_is_no_pattern(self, archive: Path) -> None:
        touch(archive, "[ab].svs", "b.svs", "f[1]/x.svs", "f1/y.svs")
        assert ids(archive / "[ab].svs") == ["[ab].svs"]
        assert ids(archive / "f[1]") == ["x.svs"]
        assert ids(archive / "f[1]" / "*.svs") == ["x.svs"]

    def test_a_slide_that_two_ways_name_comes_once(self, archive: Path) -> None:
        assert ids(archive / "**" / "*.svs", archive / "top.svs", archive) == [
            "2022/a.svs",
            "2023/a.svs",
            "2023/x/b.svs",
            "2023/x/c.tif",
            "top.svs",
        ]

    def test_lists_that_match_are_read(self, archive: Path) -> None:
        (archive / "one.csv").write_text("slide,site\ntop.svs,x\n")
        (archive / "two.csv").write_text("slide\n2023/a.svs\n")
        found = find_slides([archive / "*.csv"])
        assert [(slide.id, slide.site) for slide in found] == [("2023/a.svs", ""), ("top.svs", "x")]

    def test_nothing_that_matches_is_an_error(self, archive: Path) -> None:
        with pytest.raises(ConfigError, match=r"\*\.ndpi: no slide in .* matches this pattern"):
            find_slides([archive / "*.ndpi"])
        with pytest.raises(SlideNotFoundError, match=r"gone: does not exist"):
            find_slides([archive / "gone" / "*.svs"])

    def test_other_folders_are_not_searched(self, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        places: list[str] = []
        scandir = os.scandir

        def noted(place: str) -> Any:
            places.append(place)
            return scandir(place)

        monkeypatch.setattr(os, "scandir", noted)
        assert ids(archive / "2022" / "*.svs", archive / "top*") == ["a.svs", "top.svs"]
        assert places == [str(archive / "2022"), str(archive)]


class TestChoosing:
    ENTRIES = tuple(SlideEntry(name, f"/{name}") for name in ("1/a.svs", "1/b.svs", "2/a.svs", "2/x/c.svs"))

    def chosen(self, only: list[str], skip: list[str]) -> list[str]:
        return [entry.id for entry in choose_slides(self.ENTRIES, only, skip)]

    def test_only_and_skip(self) -> None:
        assert self.chosen([], []) == [entry.id for entry in self.ENTRIES]
        assert self.chosen(["1/*"], []) == ["1/a.svs", "1/b.svs"]
        assert self.chosen(["2"], []) == ["2/a.svs", "2/x/c.svs"]
        assert self.chosen(["**/a.svs", "2/x/"], []) == ["1/a.svs", "2/a.svs", "2/x/c.svs"]
        assert self.chosen([], ["**/a.svs"]) == ["1/b.svs", "2/x/c.svs"]
        assert self.chosen(["2/**"], ["**/a.svs"]) == ["2/x/c.svs"]

    @pytest.mark.parametrize(
        ("only", "skip", "said"),
        [
            (["1/*", "typo/*"], [], r"--only 'typo/\*' matches no slide; expected .* ids such as '1/a.svs'"),
            ([], ["a.svs"], r"--skip 'a.svs' matches no slide"),
            ([""], [], r"--only '' matches no slide"),
            (["1/*"], ["1"], "none of 4 slides is left: --skip excludes all"),
        ],
    )
    def test_what_chooses_nothing_is_an_error(self, only: list[str], skip: list[str], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            choose_slides(self.ENTRIES, only, skip)


def test_runs_take_patterns_and_go_on_with_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, out, run = write_inputs(tmp_path), tmp_path / "out", calling(capsys)
    arguments = ["explain", made / "slides", "--model", made / "pooled_linear.yaml", "--out", out, *SMALL_FLAGS]
    code, _, err = run(*arguments, "--only", "none")
    assert (code, out.exists()) == (2, False)
    assert "--only 'none' matches no slide" in only_error(err)
    code, printed, _ = run(*arguments, "--dry-run", "--json", "--skip", "a.*")
    assert (code, '"slide": "b.tif"' in printed, '"slide": "a.tif"' in printed) == (0, True, False)
    assert run(*arguments, "--only", "b*")[0] == 0
    assert set(rows_of(out)) == {"b.tif"}
    config = tmp_path / "config.yaml"
    config.write_text("skip: b.tif\n")
    assert run(*arguments, "--config", config)[0] == 0  # the same run: who chooses changes no result
    assert set(rows_of(out)) == {"a.tif", "b.tif"}
    config.write_text("only: 3\n")
    assert "only is 3, expected a pattern or a list of patterns" in only_error(run(*arguments, "--config", config)[2])


def test_calls_take_one_pattern_or_several(tmp_path: Path) -> None:
    made = write_inputs(tmp_path)
    model = str(made / "pooled_linear.yaml")
    assert [e.slide.id for e in preview(made / "slides", model, tmp_path / "o", only="a*", **SMALL).estimates] == [
        "a.tif"
    ]
    outcome = explain(made / "slides" / "*.tif", model, tmp_path / "o", skip=["a*"], **SMALL)
    assert [record.slide.id for record in outcome.records] == ["b.tif"]


def test_large_archives_and_lists_are_found_fast(tmp_path: Path) -> None:
    for folder in range(100):
        (tmp_path / f"{folder:03d}").mkdir()
        for number in range(200):
            (tmp_path / f"{folder:03d}" / f"{number}.svs").touch()
    lines = [f"{folder:03d}/{number}.svs,0.25" for folder in range(100) for number in range(200)]
    (tmp_path / "list.csv").write_text("slide,mpp\n" + "\n".join(lines))
    for given in (tmp_path, tmp_path / "list.csv", tmp_path / "**" / "*.svs"):
        started = time.perf_counter()
        found = find_slides([given])
        assert time.perf_counter() - started < 10
        assert len({slide.id for slide in found}) == 20_000
