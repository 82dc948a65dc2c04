"""Whatever a file claims, it is opened or refused in little time and memory, and in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.bombs import LOOKS, Cost, all_bombs, costs_of, kind_of
from tests.bombs_zarr import HARMFUL, Image, codec_of, zstd_zeros
from wsi_gradcam.errors import ConfigError, FeatureError, ModelError, SlideError, SlideFormatError
from wsi_gradcam.inputs.find import find_slides
from wsi_gradcam.models.load import load_model
from wsi_gradcam.slides import open_slide

KINDS = (
    *("zarr", "tiff", "picture", "mrxs", "dicom", "annotations", "mask", "list", "config", "model", "results"),
    *("features", "weights", "aggregator"),
)
SLOWER = 2  # a machine that tests, beside others' work, than the one that the bounds in seconds are told for


def _in_bounds(kinds: Sequence[str], every: int) -> dict[str, Cost]:
    costs = costs_of(kinds, 0, every)  # `python -m tests.bombs --seed` makes others
    asked = {name: replace(cost, seconds=cost.seconds / SLOWER) for name, cost in costs.items()}
    assert {name: cost for name, cost in asked.items() if not cost.bearable} == {}
    return costs


def test_some_bombs_of_each_kind_are_opened_or_refused_in_bounds() -> None:
    costs = _in_bounds(KINDS, every=4)
    assert {kind_of(name) for name in costs} == set(KINDS)
    assert len(costs) >= len(all_bombs()) // 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_bomb_is_opened_or_refused_in_bounds(kind: str) -> None:
    assert len(_in_bounds([kind], every=1)) == sum(kind_of(name) == kind for name in all_bombs())


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
    with pytest.raises(
        SlideFormatError, match="level '0': filtered with delta, unsupported in slides; convert the image"
    ):
        open_slide(path)


def test_an_axis_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = Image(2, fill=200).write(tmp_path / "a.zarr")
    text = (path / ".zattrs").read_text().replace('"name": "c", "type": "channel"', '"name": "x", "type": "space"')
    (path / ".zattrs").write_text(text)
    with pytest.raises(SlideError, match=r"a\.zarr: the image has axes .*expected y, x and colours"):
        open_slide(path, 0.5)


def test_files_say_what_is_too_large(tmp_path: Path) -> None:
    uses: dict[type[Exception], Callable[[Path], object]] = {
        SlideFormatError: open_slide,
        ConfigError: lambda path: find_slides([path]),
        ModelError: lambda path: load_model(f"hf:{path}"),
    }
    for name, error, said in (
        (
            "tiff: a description of gigabytes",
            SlideFormatError,
            "bytes in tag 270 of directory 0, expected at most 67,108",
        ),
        ("list: very many lines", ConfigError, "lines, expected at most 250,000"),
        ("list: Parquet of a long value", ConfigError, "bytes of text, expected at most 134,217,728"),
        ("model: a transformer of very many layers", ModelError, "num_hidden_layers .*, expected at most 1000"),
        (
            "model: a network of very many channels",
            ModelError,
            r"describes a network of .* weights, but its \*\.safetensors",
        ),
    ):
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        path = all_bombs()[name](folder, np.random.default_rng(0))
        with pytest.raises(error, match=said):
            uses[error](path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("weights: PyTorch, a bytearray of gigabytes", "holds a bytearray, which is not a tensor; objects in pickles"),
        ("weights: PyTorch, a bytearray of gigabytes in the older format", "holds a bytearray, which is not a tensor"),
        ("weights: PyTorch, packed numbers", "it is compressed, or a part occurs twice"),
        ("weights: PyTorch, a long description", "its description has more than 8,388,608 bytes"),
        ("weights: PyTorch, very many members", "its directory has .* bytes, expected at most 8,388,608"),
        ("features: PyTorch, a bytearray of gigabytes", "holds a bytearray, which is not a tensor; write it again"),
        ("features: NumPy, packed zeros", "features is .* bytes in .*, which is not plausible for features"),
        ("features: NumPy, very many members", "its directory has .* bytes, expected at most 8,388,608"),
        ("mrxs: vast numbers", r"a\.mrxs: Slidedat\.ini has IMAGENUMBER_X .*, expected at most 65,536"),
        ("mrxs: a configuration of gigabytes", r"a\.mrxs: Slidedat\.ini cannot be read: larger than 4 MiB"),
        (
            "dicom: sequences in sequences",
            r"a\.dcm: its sequences are nested deeper than 64 levels, which no slide needs",
        ),
        ("aggregator: very many layers behind other names", "numbers in .* tensors, more than any aggregator has"),
    ],
)
def test_files_that_are_no_such_say_why(name: str, said: str, tmp_path: Path) -> None:
    path = all_bombs()[name](tmp_path, np.random.default_rng(0))
    with pytest.raises((ModelError, FeatureError, SlideFormatError), match=said):
        LOOKS[kind_of(name)](path)


def test_numbers_of_numpy_in_weights_have_the_size_of_numbers(tmp_path: Path) -> None:
    """A type of NumPy's may have any size, and a number of that type as many bytes."""
    import pickle

    import torch

    from wsi_gradcam.models.sources import states_in

    torch.save({"state": {"w": torch.ones(2)}, "loss": np.float64(0.5)}, tmp_path / "a.pt")
    assert [list(state) for _, state in states_in(tmp_path / "a.pt", numbers=True)] == [["w"]]

    class Vast:
        def __reduce__(self) -> tuple[object, ...]:
            return np.zeros(1).dtype.type(0).__reduce__()[0], (np.dtype("V1073741824"),)

    from tests.bombs_features import saved

    saved(tmp_path / "b.pt", pickle.dumps({"w": Vast()}, 2))
    with pytest.raises(ModelError):
        states_in(tmp_path / "b.pt", numbers=True)
