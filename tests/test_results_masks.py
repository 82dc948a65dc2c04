"""Masks come back as they were written, in a file that any program opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from wsi_gradcam.errors import StoreError
from wsi_gradcam.results.overview import read_mask, write_mask

masks = npst.arrays(np.bool_, st.tuples(st.integers(1, 40), st.integers(1, 40)))


@given(masks)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, mask: npt.NDArray[np.bool_]) -> None:
    path = tmp_path_factory.mktemp("m") / "deep" / "tissue.png"
    write_mask(path, mask)
    read = read_mask(path)
    assert read.dtype == np.bool_
    np.testing.assert_array_equal(read, mask)


def test_white_is_true_in_an_ordinary_png(tmp_path: Path) -> None:
    mask = np.zeros((5, 9), np.bool_)
    mask[1, 7] = True
    write_mask(tmp_path / "m.png", mask)
    with Image.open(tmp_path / "m.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "1", (9, 5))
        assert np.argwhere(np.asarray(image.convert("L")) == 255).tolist() == [[1, 7]]


def test_equal_masks_are_equal_bytes(tmp_path: Path) -> None:
    mask = np.eye(30, dtype=np.bool_)
    for name in ("a.png", "b.png"):
        write_mask(tmp_path / name, mask)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_large_mask_takes_little_room(tmp_path: Path) -> None:
    mask = np.zeros((2048, 2048), np.bool_)
    mask[500:1500, 300:1700] = True
    write_mask(tmp_path / "m.png", mask)
    assert (tmp_path / "m.png").stat().st_size < 20_000


def test_a_disk_error_says_where(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(StoreError, match=r"out/m\.png: cannot write"):
        write_mask(tmp_path / "out" / "m.png", np.ones((2, 2), np.bool_))
