"""Whatever a file claims, it is opened or refused in little time and memory, and in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.bombs import Cost, all_bombs, costs_of
from tests.bombs_zarr import HARMFUL, Image, codec_of, zstd_zeros
from wsi_gradcam.errors import SlideError, SlideFormatError
from wsi_gradcam.slides import open_slide

KINDS = ("zarr", "tiff", "picture", "annotations")
SLOWER = 2  # a machine that tests, beside others' work, than the one that the bounds in seconds are told for


@pytest.mark.parametrize("kind", KINDS)
def test_every_bomb_is_opened_or_refused_in_bounds(kind: str) -> None:
    costs = costs_of(kind, seed=0)  # `python -m tests.bombs --seed` makes others
    asked = {name: replace(cost, seconds=cost.seconds / SLOWER) for name, cost in costs.items()}
    assert {name: cost for name, cost in asked.items() if not cost.bearable} == {}
    assert len(costs) == sum(name.startswith(kind) for name in all_bombs())


def test_a_cost_beyond_its_bounds_is_not_bearable() -> None:
    assert Cost(1, 1, "refused: x").bearable
    assert not any(cost.bearable for cost in (Cost(6, 1, "read"), Cost(1, 701, "read"), Cost(1, 1, "! KeyError: x")))


@pytest.mark.parametrize("version", [2, 3])
def test_a_chunk_that_unpacks_to_more_than_it_shows_is_refused(version: int, tmp_path: Path) -> None:
    image = Image(version, codec=codec_of("zstd", version))
    path = image.write(tmp_path / "a.zarr")
    size = 3 * 256 * 256
    image.chunk_file(path).write_bytes(zstd_zeros(size + 1))
    with pytest.raises(SlideError, match="too small"):
        open_slide(path)
    image.chunk_file(path).write_bytes(zstd_zeros(size))
    open_slide(path).close()


@pytest.mark.parametrize("codec", HARMFUL)
@pytest.mark.parametrize("place", ["compressor", "filters"])
def test_codecs_that_are_on_no_list_are_not_used(codec: str, place: str, tmp_path: Path) -> None:
    path = all_bombs()[f"zarr 2: {codec} in {place}"](tmp_path, np.random.default_rng(0))
    with pytest.raises(SlideFormatError, match=r"a\.zarr"):
        open_slide(path)
    assert not (tmp_path / "RAN").exists()


def test_a_filter_is_not_used_even_where_it_fits(tmp_path: Path) -> None:
    path = Image(2, filters=[{"id": "delta", "dtype": "|u1", "astype": "|u1"}]).write(tmp_path / "a.zarr")
    with pytest.raises(SlideFormatError, match="level '0': filtered by delta, which no slides are; convert the image"):
        open_slide(path)
