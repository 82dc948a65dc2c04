"""From paths to slides: ids never collide, each slide comes once, nothing is skipped in silence."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.listings import ids, touch
from wsi_gradcam.errors import ConfigError, SlideNotFoundError
from wsi_gradcam.inputs.find import find_slides
from wsi_gradcam.slides import open_slide


def test_a_file_is_named_by_its_name(tmp_path: Path) -> None:
    touch(tmp_path, "deep/a.svs")
    (slide,) = find_slides([tmp_path / "deep" / "a.svs"])
    assert (slide.id, slide.path) == ("a.svs", str(tmp_path / "deep" / "a.svs"))


def test_a_named_file_is_taken_whatever_its_ending(tmp_path: Path) -> None:
    touch(tmp_path, "slide.dat", "slide")
    assert ids(tmp_path / "slide.dat", tmp_path / "slide") == ["slide", "slide.dat"]


def test_a_folder_is_searched_through_and_names_its_slides(tmp_path: Path) -> None:
    touch(tmp_path, "b.svs", "x/a.tiff", "x/y/c.NDPI", "notes.txt", "x/b.png", "x/Slidedat.ini")
    assert ids(tmp_path) == ["b.svs", "x/a.tiff", "x/y/c.NDPI"]


def test_a_folder_named_like_a_slide_is_no_slide(tmp_path: Path) -> None:
    touch(tmp_path, "case.svs/a.tif")
    assert ids(tmp_path) == ["case.svs/a.tif"]


def test_files_that_macos_leaves_are_no_slides(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "._a.svs")
    assert ids(tmp_path) == ["a.svs"]


@pytest.mark.parametrize("order", [1, -1])
def test_equal_names_are_told_apart_by_the_folder_they_share(tmp_path: Path, order: int) -> None:
    touch(tmp_path, "p/1/a.svs", "p/2/a.svs", "p/2/b.svs")
    given = [tmp_path / "p" / "1", tmp_path / "p" / "2"][::order]
    assert ids(*given) == ["1/a.svs", "2/a.svs", "2/b.svs"]


def test_equal_names_of_files_are_told_apart(tmp_path: Path) -> None:
    touch(tmp_path, "1/a.svs", "2/x/a.svs")
    assert ids(tmp_path / "1" / "a.svs", tmp_path / "2" / "x" / "a.svs") == ["1/a.svs", "2/x/a.svs"]


def test_the_same_file_however_written_is_one_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "d/a.svs", "d/e/b.svs")
    monkeypatch.chdir(tmp_path)
    ways = ["d/a.svs", "./d/a.svs", "d/../d/a.svs", "d/e/../a.svs", str(tmp_path / "d" / "a.svs")]
    assert ids(*ways) == ["a.svs"]
    assert ids("d", "d/e", "d/a.svs", "d/../d") == ["a.svs", "e/b.svs"]


def test_a_folder_reached_by_a_link_is_the_same_folder(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.svs")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert ids(tmp_path / "real", tmp_path / "link") == ["a.svs"]


def test_a_linked_file_keeps_the_name_it_was_given(tmp_path: Path) -> None:
    touch(tmp_path, "store/8f3a")
    (tmp_path / "in").mkdir()
    for name in ("case1.svs", "case2.svs"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "store" / "8f3a")
    assert ids(tmp_path / "in") == ["case1.svs", "case2.svs"]


def test_relative_and_parent_paths_give_clean_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "d/a.svs", "d/e/b.svs")
    monkeypatch.chdir(tmp_path / "d" / "e")
    assert ids("..") == ["a.svs", "e/b.svs"]
    assert ids(".") == ["b.svs"]


names = st.sampled_from(["a.svs", "b.tif", "x/a.svs", "x/b.tif", "x/y/a.svs", "y/a.svs", "y/x/a.svs"])


@given(st.sets(names, min_size=1), st.lists(st.sampled_from([".", "x", "x/y", "y", "y/x", *"ab"]), min_size=1))
def test_ids_are_unique_clean_and_every_slide_comes_once(
    tmp_path_factory: pytest.TempPathFactory, files: set[str], given_names: list[str]
) -> None:
    root = tmp_path_factory.mktemp("in")
    touch(root, *files)
    given_paths = [root / name for name in given_names]
    given_paths = [p for p in given_paths if p.is_dir() and any(f.is_file() for f in p.rglob("*"))]
    given_paths += [root / min(files)]
    expected = {f for p in given_paths for f in ([p] if p.is_file() else p.rglob("*")) if f.is_file()}
    slides = find_slides(given_paths)
    found = [slide.id for slide in slides]
    assert {Path(slide.path) for slide in slides} == expected
    assert len(slides) == len(expected)
    assert len(set(found)) == len(found)
    assert found == sorted(found)
    for slide in slides:
        assert ".." not in PurePosixPath(slide.id).parts
        assert Path(slide.path).as_posix().endswith("/" + slide.id)


@pytest.mark.parametrize("order", [1, -1])
def test_a_missing_path_is_named_even_among_good_ones(tmp_path: Path, order: int) -> None:
    touch(tmp_path, "a.svs")
    with pytest.raises(SlideNotFoundError, match=r"gone\.svs: does not exist, .*check the path"):
        find_slides([tmp_path / "a.svs", tmp_path / "gone.svs"][::order])


def test_a_folder_without_slides_says_what_was_looked_for(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt")
    with pytest.raises(ConfigError, match=r"no slides in this folder; expected files ending in .*\.svs"):
        find_slides([tmp_path])


def test_nothing_given_is_refused() -> None:
    with pytest.raises(ConfigError, match="no slide given"):
        find_slides([])


def dicom(series: str, instance: int) -> bytes:
    """The head of a DICOM file as far as it tells the series."""
    uid = series.encode() + b"\0" * (len(series) % 2)
    return (
        bytes(128)
        + b"DICM"
        + instance.to_bytes(4, "little")
        + b"\x20\x00\x0e\x00UI"
        + bytes([len(uid), 0])
        + uid
        + b"end"
    )


class TestDicom:
    def write(self, root: Path, files: dict[str, tuple[str, int]]) -> None:
        for name, (series, instance) in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(dicom(series, instance))

    def test_the_files_of_a_series_are_one_slide(self, tmp_path: Path) -> None:
        self.write(tmp_path, {f"s/{i}.dcm": ("1.2.3", i) for i in range(4)})
        assert ids(tmp_path) == ["s/0.dcm"]
        assert ids(*sorted((tmp_path / "s").iterdir())) == ["0.dcm"]

    def test_two_series_in_one_folder_are_two_slides(self, tmp_path: Path) -> None:
        self.write(tmp_path, {"a0.dcm": ("1.2.3", 0), "a1.dcm": ("1.2.3", 1), "b0.dcm": ("1.2.34", 0)})
        assert ids(tmp_path) == ["a0.dcm", "b0.dcm"]

    def test_equal_series_in_two_folders_are_two_slides(self, tmp_path: Path) -> None:
        self.write(tmp_path, {"a/0.dcm": ("1.2.3", 0), "b/0.dcm": ("1.2.3", 0)})
        assert ids(tmp_path) == ["a/0.dcm", "b/0.dcm"]

    def test_files_that_do_not_tell_their_series_are_one_slide_a_folder(self, tmp_path: Path) -> None:
        touch(tmp_path, "a/0.dcm", "a/1.DCM", "b/0.dcm")
        assert ids(tmp_path) == ["a/0.dcm", "b/0.dcm"]

    def test_what_a_list_tells_of_any_file_is_told_of_the_slide(self, tmp_path: Path) -> None:
        self.write(tmp_path, {f"s/{i}.dcm": ("1.2.3", i) for i in range(3)})
        (tmp_path / "list.csv").write_text("slide,mpp\ns/1.dcm,0.5\n", encoding="utf-8")
        (slide,) = find_slides([tmp_path / "s", tmp_path / "list.csv"])
        assert (slide.id, slide.mpp) == ("0.dcm", (0.5, 0.5))

    def test_real_slides_in_one_folder_are_all_found_and_open(self, shared_data: Path, tmp_path: Path) -> None:
        for name in ("highdicom-sm_image", "gcp-multi_frame_jpeg_camelyon_challenge_image"):
            shutil.copy(shared_data / "slides/dicom" / name / f"{name}.dcm", tmp_path)
        slides = [open_slide(entry.path) for entry in find_slides([tmp_path])]
        assert {(slide.info.height, slide.info.width) for slide in slides} == {(50, 50), (700, 1152)}
        for slide in slides:
            slide.close()


def test_linked_folders_are_searched_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x.svs").write_bytes(b"")
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "circle").symlink_to(tmp_path / "archive")
    assert [slide.id for slide in find_slides([tmp_path / "archive"])] == ["link/x.svs"]


def test_slides_that_would_lie_in_each_others_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "q" / "a.svs").mkdir(parents=True)
    (tmp_path / "p" / "a.svs").write_bytes(b"")
    (tmp_path / "q" / "a.svs" / "b.svs").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"a.svs and a.svs/b.svs would share a folder"):
        find_slides([tmp_path / "p" / "a.svs", tmp_path / "q"])
