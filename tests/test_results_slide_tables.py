"""The kept list of a run: ids never change and never collide, whatever is added, moved or left out later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runs import SMALL, rows_of, toy_spec
from tests.synthetic import write_marker_slide
from wsi_gradcam.api import explain, preview
from wsi_gradcam.errors import ConfigError, StoreError
from wsi_gradcam.inputs.find import SlideEntry, find_slides
from wsi_gradcam.results.seals import KEY, Seal, seal_of
from wsi_gradcam.results.slide_tables import (
    COLUMNS,
    MAX_SLIDES,
    assign_ids,
    parse_rows,
    parse_slide_records,
    read_slide_records,
    record_slides,
)
from wsi_gradcam.results.validation import validate
from wsi_gradcam.run.types import RunListener, Workload

MODEL = toy_spec("pooled_linear")


def touch(root: Path, *names: str) -> list[Path]:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return [root / name for name in names]


def ids_by_path(root: Path, entries: list[SlideEntry]) -> dict[str, str]:
    return {Path(entry.path).relative_to(root).as_posix(): entry.id for entry in entries}


def kept(out: Path, *paths: Path) -> list[SlideEntry]:
    out.mkdir(exist_ok=True)
    return record_slides(out / "slides.jsonl", find_slides(paths))


def test_a_slide_keeps_its_id_when_another_of_its_name_comes(tmp_path: Path) -> None:
    first, second, third = touch(tmp_path, "1/a.svs", "2/a.svs", "3/x/a.svs")
    assert ids_by_path(tmp_path, kept(tmp_path / "out", first)) == {"1/a.svs": "a.svs"}
    assert ids_by_path(tmp_path, kept(tmp_path / "out", first, second)) == {"1/a.svs": "a.svs", "2/a.svs": "2/a.svs"}
    assert ids_by_path(tmp_path, kept(tmp_path / "out", second)) == {"2/a.svs": "2/a.svs"}
    assert ids_by_path(tmp_path, kept(tmp_path / "out", third, second, first)) == {
        "1/a.svs": "a.svs",
        "2/a.svs": "2/a.svs",
        "3/x/a.svs": "3/x/a.svs",
    }


def test_ids_of_a_first_run_are_those_of_the_search(tmp_path: Path) -> None:
    touch(tmp_path, "in/1/a.svs", "in/2/a.svs", "in/b.svs")
    assert kept(tmp_path / "out", tmp_path / "in") == find_slides([tmp_path / "in"])


def test_an_archive_that_moved_keeps_its_ids(tmp_path: Path) -> None:
    touch(tmp_path, "old/1/a.svs", "old/2/a.svs")
    before = kept(tmp_path / "out", tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    moved = kept(tmp_path / "out", tmp_path / "new")
    assert [entry.id for entry in moved] == [entry.id for entry in before]
    touch(tmp_path, "more/1/a.svs")
    both = ids_by_path(tmp_path, kept(tmp_path / "out", tmp_path / "new", tmp_path / "more"))
    assert both == {"new/1/a.svs": "1/a.svs", "new/2/a.svs": "2/a.svs", "more/1/a.svs": "more/1/a.svs"}


def test_an_id_stays_with_the_file_that_had_it_first(tmp_path: Path) -> None:
    """A copy, or another file that will be refused, uses the id as long as the first is not given."""
    first, second = touch(tmp_path, "1/a.svs", "2/a.svs")
    kept(tmp_path / "out", first)
    assert ids_by_path(tmp_path, kept(tmp_path / "out", second)) == {"2/a.svs": "a.svs"}
    assert ids_by_path(tmp_path, kept(tmp_path / "out", first, second)) == {"1/a.svs": "a.svs", "2/a.svs": "2/a.svs"}


def test_urls_are_kept_without_their_secrets(tmp_path: Path) -> None:
    urls = ["https://host/1/a.svs?sign=secret", "https://me:secret@host/2/a.svs"]
    out = tmp_path / "slides.jsonl"
    assert [entry.id for entry in record_slides(out, find_slides(urls[:1]))] == ["a.svs"]
    (other,) = record_slides(out, find_slides(urls[1:]))
    assert (other.id, other.address) == ("a.svs", urls[1])
    found = record_slides(out, find_slides(urls))
    assert {entry.id: entry.address for entry in found} == dict(zip(["a.svs", "2/a.svs"], urls, strict=True))
    assert b"secret" not in out.read_bytes()


def test_no_slide_comes_to_lie_in_anothers_folder(tmp_path: Path) -> None:
    first, _ = touch(tmp_path, "p/a.svs", "q/a.svs/b.svs")
    kept(tmp_path / "out", first)
    found = ids_by_path(tmp_path, kept(tmp_path / "out", tmp_path / "q"))
    assert found == {"q/a.svs/b.svs": "b.svs"}


def test_when_every_part_of_the_path_is_taken_numbers_follow() -> None:
    record = {name: {"id": name, "path": f"/elsewhere/{number}"} for number, name in enumerate(["a.svs", "x/a.svs"])}
    entries = [SlideEntry("a.svs", "/x/a.svs"), SlideEntry("other", "/elsewhere/0"), SlideEntry("y", "/elsewhere/1")]
    assert [entry.id for entry in assign_ids(entries, record)] == ["2/x/a.svs", "a.svs", "x/a.svs"]
    record["2/x/a.svs"] = {"id": "2/x/a.svs", "path": "/elsewhere/2"}
    assert "3/x/a.svs" in [entry.id for entry in assign_ids(entries, record)]


names = st.sampled_from(["a.svs", "b.svs", "x/a.svs", "x/b.svs", "x/y/a.svs", "y/a.svs/b.svs", "z/x/a.svs"])
calls = st.lists(st.lists(st.tuples(st.sampled_from("123"), names, st.booleans()), min_size=1), min_size=1, max_size=5)


@given(calls)
def test_however_an_archive_grows_ids_stay_and_never_collide(
    tmp_path_factory: pytest.TempPathFactory, calls: list[list[tuple[str, str, bool]]]
) -> None:
    root = tmp_path_factory.mktemp("in")
    before: dict[str, str] = {}
    for call in calls:
        touch(root, *(f"{folder}/{name}" for folder, name, _ in call))
        given_paths = [root / folder / (name.split("/")[0] if whole else name) for folder, name, whole in call]
        try:
            entries = find_slides(given_paths)
        except ConfigError as error:  # no run can begin with these
            assert "would share a folder" in str(error)  # noqa: PT017
            continue
        found = {entry.path: entry.id for entry in record_slides(root / "slides.jsonl", entries)}
        after = {row["path"]: name for name, row in read_slide_records(root / "slides.jsonl").items()}
        assert before.items() <= after.items()
        assert found.keys() == {entry.path for entry in entries}
        assert all(found[path] == name for path, name in before.items() if path in found)
        for ids in (set(found.values()), set(after.values())):
            assert not any(parent.as_posix() in ids for name in ids for parent in PurePosixPath(name).parents)
        assert len(set(found.values())) == len(found)
        before = after


def test_the_list_is_kept_as_it_was_read(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "b.svs", "m.png")
    (tmp_path / "list.csv").write_text("slide,mpp,mask,label,site,scanner\na.svs,0.25,m.png,tumour,Hull,S360\nb.svs\n")
    out = tmp_path / "out"
    kept(out, tmp_path / "list.csv")
    lines = (out / "slides.jsonl").read_bytes().splitlines()
    assert [seal_of(line) for line in lines] == [Seal.HOLDS, Seal.HOLDS]
    rows = [{key: value for key, value in json.loads(line).items() if key != KEY} for line in lines]
    assert rows == [
        {
            "id": "a.svs",
            "path": str(tmp_path / "a.svs"),
            "mpp": [0.25, 0.25],
            "mask": str(tmp_path / "m.png"),
            "label": "tumour",
            "site": "Hull",
            "scanner": "S360",
        },
        {"id": "b.svs", "path": str(tmp_path / "b.svs")},
    ]


def test_a_name_that_is_no_text_is_kept(tmp_path: Path) -> None:
    entry = SlideEntry("\udcff.svs", str(tmp_path / "\udcff.svs"))
    record_slides(tmp_path / "slides.jsonl", [entry])
    assert (
        assign_ids([SlideEntry("other", entry.path)], read_slide_records(tmp_path / "slides.jsonl"))[0].id == entry.id
    )


def test_what_does_not_change_is_not_written_again(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "b.svs")
    kept(tmp_path / "out", tmp_path / "a.svs", tmp_path / "b.svs")
    before = (tmp_path / "out" / "slides.jsonl").stat()
    kept(tmp_path / "out", tmp_path / "a.svs")
    after = (tmp_path / "out" / "slides.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"id": "a"}', '{"id": 1, "path": "p"}', "\xff"])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "slides.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError, match=r"slides\.jsonl: damaged; delete it and run the same command again"):
        read_slide_records(path)


def test_a_folder_in_its_place_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read: Is a directory; choose another --out"):
        read_slide_records(tmp_path)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1/a.tif and 2/a.tif, which differ."""
    folder = tmp_path_factory.mktemp("slides")
    for seed in (1, 2):
        (folder / str(seed)).mkdir()
        write_marker_slide(folder / str(seed) / "a.tif", 260, 300, mpp=0.25, markers=[], marker_px=16, seed=seed)
    return folder


class TestRuns:
    def test_a_growing_archive_is_explained_once(self, slides: Path, tmp_path: Path) -> None:
        explain(slides / "1", MODEL, tmp_path, **SMALL)
        both = [slides / "1", slides / "2"]
        found = preview(both, MODEL, tmp_path, **SMALL)
        assert [e.slide.id for e in found.estimates] == ["2/a.tif", "a.tif"]
        assert len(read_slide_records(tmp_path / "slides.jsonl")) == 1, "a preview writes nothing"
        outcome = explain(both, MODEL, tmp_path, **SMALL)
        assert {r.slide.id: r.skipped for r in outcome.records} == {"a.tif": True, "2/a.tif": False}
        assert all(record.skipped for record in explain(slides, MODEL, tmp_path, **SMALL).records)
        assert {name: row["path"] for name, row in rows_of(tmp_path).items()} == {
            "a.tif": str(slides / "1" / "a.tif"),
            "2/a.tif": str(slides / "2" / "a.tif"),
        }
        explain(both, MODEL, tmp_path, **SMALL, overwrite=True)
        assert set(rows_of(tmp_path)) == {"a.tif", "2/a.tif"}
        assert validate(tmp_path) == []

    def test_a_moved_archive_goes_on_and_another_file_is_refused(self, slides: Path, tmp_path: Path) -> None:
        shutil.copytree(slides, tmp_path / "in")
        explain(tmp_path / "in", MODEL, tmp_path / "out", **SMALL)
        (tmp_path / "in").rename(tmp_path / "moved")
        moved = explain(tmp_path / "moved", MODEL, tmp_path / "out", **SMALL)
        assert all(record.skipped for record in moved.records)
        assert validate(tmp_path / "out") == []
        shutil.copy(slides / "2" / "a.tif", tmp_path / "moved" / "1" / "a.tif")
        (failed,) = explain(tmp_path / "moved", MODEL, tmp_path / "out", **SMALL).failed
        assert failed.slide.id == "1/a.tif"
        assert "holds results of a different file from" in failed.error

    def test_runs_that_begin_at_the_same_time_never_share_an_id(self, slides: Path, tmp_path: Path) -> None:
        """The one that comes second has found its slides before the first wrote them down."""
        found = find_slides([slides / "1", slides / "2"])
        explain(slides / "1", MODEL, tmp_path, **SMALL)
        both = record_slides(tmp_path / "slides.jsonl", found)
        assert {entry.id for entry in both} == {"a.tif", "2/a.tif"}

    def test_the_list_is_written_before_any_work(self, slides: Path, tmp_path: Path) -> None:
        class Stopped(RunListener):
            def run_started(self, workload: Workload, slides: Sequence[SlideEntry], dashboard: str) -> None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            explain(slides, MODEL, tmp_path, **SMALL, listener=Stopped())
        assert set(read_slide_records(tmp_path / "slides.jsonl")) == {"1/a.tif", "2/a.tif"}


def test_a_table_of_more_slides_than_a_run_has_is_refused_soon(tmp_path: Path) -> None:
    row = ",".join(["a.svs", "/a.svs", "ok", "", *["0"] * 12]) + "\n"
    assert len(parse_rows("slides.csv", (",".join(COLUMNS) + "\n" + row * 1000).encode())) == 1
    with pytest.raises(
        StoreError, match=r"slides\.csv: damaged \(ValueError: 250,003 lines, expected at most 250,000\)"
    ):
        parse_rows("slides.csv", (",".join(COLUMNS) + "\n" + row * (MAX_SLIDES + 2)).encode())
    with pytest.raises(StoreError, match=r"slides\.jsonl: damaged"):
        parse_slide_records("slides.jsonl", b'{"id": "a", "path": "b"}\n' * (MAX_SLIDES + 2))


def test_a_run_of_more_slides_than_its_table_may_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsi_gradcam.results.slide_tables.MAX_SLIDES", 2)
    entries = [SlideEntry(f"{name}.svs", f"/{name}.svs") for name in "abc"]
    with pytest.raises(ConfigError, match="3 slides in one run, expected at most 2; split them into several runs"):
        record_slides(tmp_path / "slides.jsonl", entries)
    assert not (tmp_path / "slides.jsonl").exists()
    assert len(record_slides(tmp_path / "slides.jsonl", entries[:2])) == 2


def test_equal_cells_of_many_rows_are_one_text(tmp_path: Path) -> None:
    lines = [",".join([f"{i}.svs", f"/{i}.svs", "ok", "", *["0.2525"] * 10, "", ""]) for i in range(300)]
    rows = list(parse_rows("slides.csv", "\n".join([",".join(COLUMNS), *lines]).encode()).values())
    assert [row["id"] for row in rows] == [f"{i}.svs" for i in range(300)]
    assert len({id(row["mpp_y"]) for row in rows}) == 1
