"""The run's window is the quantile over the pixels of all slides, kept up to date, and changes no values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wsi_gradcam
from tests.runs import SMALL, Heatmap, toy_spec
from tests.synthetic import write_marker_slide
from wsi_gradcam.results import display
from wsi_gradcam.results.display import Sketch, bins_of, edges_of
from wsi_gradcam.results.run import open_result
from wsi_gradcam.results.validation import validate

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
LABEL = "gradcam: marker"
SIDES: tuple[Literal["lower", "higher"], ...] = ("lower", "higher")


@given(st.lists(FLOATS, min_size=2, max_size=50))
def test_bins_are_in_the_order_of_the_values(values: list[float]) -> None:
    ordered = np.sort(np.array(values, np.float32))
    bins = bins_of(ordered).astype(np.int64)
    assert (np.diff(bins) >= 0).all() or (ordered == 0).sum() > 1  # -0.0 and 0.0 are equal and lie in two bins
    for value, number in zip(ordered.tolist(), bins.tolist(), strict=True):
        low, high = edges_of(number)
        assert low <= value <= high


@given(st.lists(FLOATS, min_size=1, max_size=200), st.floats(0, 1))
def test_a_quantile_is_off_by_less_than_a_bin(values: list[float], share: float) -> None:
    array = np.array(values, np.float32)
    sketch = Sketch()
    sketch.add(array)
    lower = float(np.quantile(array, max(0, share - 1 / len(array)), method="lower"))
    upper = float(np.quantile(array, share, method="higher"))
    tolerance = 1e-40 + max(abs(lower), abs(upper)) / 127
    assert lower - tolerance <= sketch.quantile(share) <= upper + tolerance


def test_sketches_of_parts_add_up() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=5000).astype(np.float32)
    whole, parts = Sketch(), Sketch()
    whole.add(values)
    for part in np.array_split(values[::-1], 7):
        parts.add(part)
    assert whole.to_json() == parts.to_json()
    assert Sketch.from_json(json.loads(json.dumps(whole.to_json()))).to_json() == whole.to_json()
    assert abs(whole.quantile(0.995) - np.quantile(values, 0.995)) < 0.05


def test_nothing_has_no_quantile() -> None:
    sketch = Sketch()
    sketch.add(np.array([np.nan, np.inf], np.float32))
    assert sketch.total == 0
    assert np.isnan(sketch.quantile(0.5))
    assert Sketch.from_json(sketch.to_json()).maximum == float("-inf")


def explain(folder: Path, *names: str) -> None:
    settings = {**SMALL, "tissue": "everything", "method": ("gradcam", "eigencam")}  # much green is taken for ink
    wsi_gradcam.explain([folder / name for name in names], toy_spec("marker"), folder / "out", **settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with slides a (some markers), b (none), and a run over both."""
    folder = tmp_path_factory.mktemp("display")
    markers = [(300, 300), (413, 709), (1001, 998)]
    write_marker_slide(folder / "a.tif", 1300, 1300, mpp=0.25, markers=markers, marker_px=60, glass_px=200)
    write_marker_slide(folder / "b.tif", 900, 700, mpp=0.25, markers=[], marker_px=60)
    explain(folder, "a.tif", "b.tif")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def is_quantile(value: float, out: Path, *names: str) -> bool:
    """Whether a value is the quantile of all explained pixels of level 0, by numpy, as far as a sketch can tell."""
    values = []
    for name in names:
        heatmap = Heatmap(out / name)
        values.append(heatmap.level(0, LABEL)[heatmap.flags(0) & 2 > 0])
    low, high = (np.quantile(np.concatenate(values), 0.995, method=side) for side in SIDES)
    return bool(low * 127 / 128 <= value <= high * 129 / 128)


def test_the_window_is_the_quantile_over_all_slides(folder: Path) -> None:
    windows = open_result(folder / "out").windows()
    assert windows[LABEL][0] == 0
    assert is_quantile(windows[LABEL][1], folder / "out", "a.tif", "b.tif")
    assert not is_quantile(windows[LABEL][1], folder / "out", "a.tif")
    assert windows[LABEL][1] < open_result(folder / "out")["a.tif"].channel("marker").window[1]
    assert windows["gradcam: other"] == (0.0, 1.0)  # no evidence: never narrower than a logit
    assert windows["probability: marker"] == (0.0, 1.0)


def test_it_is_kept_and_no_value_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_result(folder / "out").windows()
    monkeypatch.setattr(display, "_sketch", lambda *_: pytest.fail("a slide was read again"))
    assert open_result(folder / "out").windows() == first
    assert validate(folder / "out") == []


def test_a_new_slide_is_added_and_only_it_is_read(folder: Path) -> None:
    open_result(folder / "out").windows()
    markers = [(y, x) for y in range(100, 900, 80) for x in range(100, 900, 80)]
    write_marker_slide(folder / "c.tif", 1000, 1000, mpp=0.25, markers=markers, marker_px=70)
    explain(folder, "c.tif")
    read: list[tuple[int, int]] = []
    windows = open_result(folder / "out").windows(lambda *count: read.append(count))
    assert read == [(1, 1)]
    (folder / "out" / "display.json").unlink()
    assert open_result(folder / "out").windows() == windows


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"channels": {"x": {"bins": [-99999999], "counts": [1]}}}'])
def test_a_damaged_file_is_made_anew(folder: Path, damage: str) -> None:
    first = open_result(folder / "out").windows()
    (folder / "out" / "display.json").write_text(damage)
    assert open_result(folder / "out").windows() == first
    assert json.loads((folder / "out" / "display.json").read_text())["version"] == 1


def test_a_slide_explained_anew_is_counted_once(folder: Path) -> None:
    first = open_result(folder / "out").windows()
    table = folder / "out" / "slides.csv"
    lines = table.read_text().splitlines()
    lines[1] = lines[1].replace(",ok,,", ",ok,changed,")
    table.write_text("\n".join(lines) + "\n")
    read: list[tuple[int, int]] = []
    assert open_result(folder / "out").windows(lambda *count: read.append(count)) == first
    assert read == [(1, 2), (2, 2)]


def test_a_slide_that_cannot_be_read_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "out" / "b.tif" / "heatmap.ome.zarr")
    windows = open_result(folder / "out").windows()
    assert is_quantile(windows[LABEL][1], folder / "out", "a.tif")
    stored = json.loads((folder / "out" / "display.json").read_text())
    assert list(stored["left_out"]) == ["b.tif"]
    assert list(stored["slides"]) == ["a.tif"]
    shutil.rmtree(folder / "out" / "a.tif" / "manifest")
    (folder / "out" / "display.json").unlink()
    assert open_result(folder / "out").windows() == {}


def test_a_folder_that_cannot_be_written_has_windows_too(folder: Path) -> None:
    (folder / "out" / "display.json").mkdir()  # root may write anywhere else
    assert open_result(folder / "out").windows()[LABEL][1] > 1


def test_pixels_of_coarser_levels_count_for_what_they_stand_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_result(folder / "out").windows()
    total = json.loads((folder / "out" / "display.json").read_text())["channels"][LABEL]["counts"]
    monkeypatch.setattr(display, "STATISTICS_PX", 20_000)  # of a the second level, of b the first
    (folder / "out" / "display.json").unlink()
    coarse = open_result(folder / "out").windows()
    found = json.loads((folder / "out" / "display.json").read_text())["channels"][LABEL]["counts"]
    assert sum(found) == pytest.approx(sum(total), rel=0.02)
    assert coarse[LABEL][1] == pytest.approx(first[LABEL][1], rel=0.3)
