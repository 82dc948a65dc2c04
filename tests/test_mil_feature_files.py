"""Files of features from strangers: what they claim is not believed, and no more is read than asked for."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from tests.feature_formats import DIMENSIONS, MPP, clam, clam_patches, frame, slide2vec, stamp, vectors
from wsi_gradcam.errors import FeatureError
from wsi_gradcam.mil import feature_arrays
from wsi_gradcam.mil.feature_files import open_features
from wsi_gradcam.mil.features import FeatureBag

COUNT = 20
XY = np.array([(512 * (i % 5), 512 * (i // 5)) for i in range(COUNT)])
MARKS = {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20}


def opened(place: Path, **flags: Any) -> FeatureBag:
    return open_features(place, frame(), **flags)


def h5(path: Path, features: Any, coordinates: Any = XY, **storage: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=features, **storage)
        file["coords"] = coordinates
        file["coords"].attrs.update(MARKS)
    return path


def ones(dtype: Any = np.float32) -> np.ndarray:
    return np.ones((COUNT, DIMENSIONS), dtype)


# --- arrays of all sorts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "given"), [("f2", "f2"), ("f4", "f4"), ("f8", "f4"), (">f4", "f4"), (">f2", "f2")])
def test_kinds_of_numbers_in_hdf5(stored: str, given: str, tmp_path: Path) -> None:
    bag = opened(h5(tmp_path / "a.h5", vectors(COUNT, 3).astype(stored)))
    assert bag.features.dtype == bag.features[2:5].dtype == np.dtype(given)
    np.testing.assert_array_equal(bag.features[2:5], vectors(COUNT, 3).astype(stored)[2:5].astype(given))
    bag.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("wrapped", [False, True])
def test_kinds_of_numbers_in_pytorch(dtype: torch.dtype, wrapped: bool, tmp_path: Path) -> None:
    made = clam(tmp_path, frame(), only="pt")
    tensor = torch.from_numpy(vectors(len(made.xy), 11)).to(dtype)
    torch.save({"features": tensor[None]} if wrapped else tensor, tmp_path / "pt_files" / "a.pt")
    bag = opened(tmp_path)
    assert bag.features.dtype == (np.float16 if dtype == torch.float16 else np.float32)
    np.testing.assert_array_equal(bag.features[:7], tensor[:7].float().numpy().astype(bag.features.dtype))


@pytest.mark.parametrize("shape", [(1, COUNT, DIMENSIONS), (COUNT, 1, DIMENSIONS)])
@pytest.mark.parametrize("chunks", [None, True])
def test_an_axis_of_one(shape: tuple[int, ...], chunks: bool | None, tmp_path: Path) -> None:
    values = vectors(COUNT, 3)
    with opened(h5(tmp_path / "a.h5", values.reshape(shape), XY[None], chunks=chunks)) as bag:
        assert bag.features.shape == values.shape
        np.testing.assert_array_equal(bag.features[4:9], values[4:9])


def test_rows_are_asked_for_as_of_arrays(tmp_path: Path) -> None:
    values = vectors(COUNT, 3)
    with opened(h5(tmp_path / "a.h5", values, compression="gzip", shuffle=True, fletcher32=True)) as bag:
        rows = bag.features
        np.testing.assert_array_equal(rows[-1], values[-1])
        np.testing.assert_array_equal(rows[3:15:4], values[3:15:4])
        np.testing.assert_array_equal(rows[::-1], values[::-1])
        np.testing.assert_array_equal(rows[[7, 2]], values[[7, 2]])
        np.testing.assert_array_equal(np.asarray(rows), values)
        assert rows[5:5].shape == (0, DIMENSIONS)
        with pytest.raises(IndexError):
            rows[COUNT]


def test_a_slide_without_patches(tmp_path: Path) -> None:
    with opened(h5(tmp_path / "a.h5", np.zeros((0, DIMENSIONS), np.float32), np.zeros((0, 2), np.int64))) as bag:
        assert (len(bag), bag.boxes.shape) == (0, (0, 4))


def test_no_more_is_read_than_is_asked_for(tmp_path: Path) -> None:
    """16 MB of features are opened and read in a fifth of it, from each kind of file."""
    count, dimensions = 4096, 1024
    values = np.ones((count, dimensions), np.float32)
    grid = np.array([(64 * (i % 64), 64 * (i // 64)) for i in range(count)])
    clam_patches(tmp_path / "pt" / "patches" / "a.h5", frame(), grid, 64)
    clam_patches(tmp_path / "h5" / "a.h5", frame(), grid, 64)
    (tmp_path / "npz" / "tiles").mkdir(parents=True)
    torch.save(torch.from_numpy(values), tmp_path / "pt" / "a.pt")
    with h5py.File(tmp_path / "h5" / "a.h5", "a") as file:
        file.create_dataset("features", data=values, chunks=(32, dimensions))
    np.savez_compressed(tmp_path / "npz" / "a.npz", features=values)
    np.savez(tmp_path / "npz" / "tiles" / "a.coordinates.npz", x=grid[:, 0], y=grid[:, 1])
    torch.load(tmp_path / "pt" / "a.pt", weights_only=True)  # imports
    for kind in ("h5", "pt", "npz"):
        tracemalloc.start()
        with opened(tmp_path / kind, patch_um=64 * MPP, unit="px") as bag:
            assert sum(bag.features[i : i + 256].sum() for i in range(0, count, 256)) == values.size
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < values.nbytes / 4, kind


# --- damaged and hostile ones ----------------------------------------------------------------------------------------


def test_vectors_that_are_no_numbers_are_told_by_patch(tmp_path: Path) -> None:
    for value, dtype in ((np.nan, "f4"), (np.inf, "f2"), (1e300, "f8")):
        values = ones(dtype)
        values[13, 2] = value
        with (
            opened(h5(tmp_path / "a.h5", values)) as bag,
            pytest.raises(FeatureError, match=r"a\.h5: features of patch 13 are not finite"),
        ):
            [bag.features[i : i + 8] for i in range(0, COUNT, 8)]


def linked(file: h5py.File, outside: Path) -> None:
    file["features"] = h5py.ExternalLink(str(outside), "features")


def soft(file: h5py.File, outside: Path) -> None:
    file["other"] = ones()
    file["features"] = h5py.SoftLink("/other")


def virtual(file: h5py.File, outside: Path) -> None:
    layout = h5py.VirtualLayout((COUNT, DIMENSIONS), "f4")
    layout[:] = h5py.VirtualSource(str(outside), "features", (COUNT, DIMENSIONS))
    file.create_virtual_dataset("features", layout)


def raw(file: h5py.File, outside: Path) -> None:
    file.create_dataset("features", (COUNT, DIMENSIONS), "f4", external=[(str(outside), 0, COUNT * DIMENSIONS * 4)])


def inner(file: h5py.File, outside: Path) -> None:
    file.create_group("features")["uni"] = h5py.ExternalLink(str(outside), "features")


def unwritten(file: h5py.File, outside: Path) -> None:
    file.create_dataset("features", (COUNT, DIMENSIONS), "f4", chunks=(4, DIMENSIONS))[:8] = 1


def contiguous(file: h5py.File, outside: Path) -> None:
    file.create_dataset("features", (COUNT, DIMENSIONS), "f4")


def chunk(file: h5py.File, outside: Path) -> None:
    file.create_dataset("features", (COUNT, 8), "f4", maxshape=(None, 8), chunks=(1 << 24, 8), compression="gzip")


def scaled(file: h5py.File, outside: Path) -> None:
    file.create_dataset("features", data=ones(), chunks=True, scaleoffset=3)


def words(file: h5py.File, outside: Path) -> None:
    file["features"] = np.array([b"x"] * COUNT)


def objects(file: h5py.File, outside: Path) -> None:
    file.create_dataset("features", (COUNT, DIMENSIONS), h5py.string_dtype())


def counted(file: h5py.File, outside: Path) -> None:
    file["features"] = ones(np.int32)


def one_vector(file: h5py.File, outside: Path) -> None:
    file["features"] = np.ones(768, np.float32)


def deep(file: h5py.File, outside: Path) -> None:
    file["features"] = np.ones((COUNT, 4, DIMENSIONS), np.float32)


def short(file: h5py.File, outside: Path) -> None:
    file["features"] = ones()[:-1]


def patient(file: h5py.File, outside: Path) -> None:
    file["feats"] = ones()
    file.attrs["feat_type"] = "patient"


def endless(file: h5py.File, outside: Path) -> None:
    file.create_dataset("features", (1 << 40, 1536), "f4", chunks=(32, 1536))


HOSTILE: dict[str, Callable[[h5py.File, Path], None]] = {
    "external link": linked,
    "'features' is an external link": soft,
    "'uni' is an external link": inner,
    "stored in other files, which are not read; copy": virtual,
    "stored in other files, which are not read": raw,
    "is incomplete": unwritten,
    r"declares \(20, 8\), but is incomplete": contiguous,
    "stored in chunks of": chunk,
    "compressed with filter 6": scaled,
    r"holds \|S1, expected numbers": words,
    "holds object, expected numbers": objects,
    "features are int32, expected floating": counted,
    r"no features of a\.svs, but features of a slide; expected": one_vector,
    "an array of 20 x 4 x 8": deep,
    "20 coordinates for 19 feature vectors": short,
    "but features of a patient; expected": patient,
    "but is incomplete": endless,
}


@pytest.mark.parametrize(("message", "make"), HOSTILE.items(), ids=[make.__name__ for make in HOSTILE.values()])
def test_hdf5_is_held_against_what_it_claims(
    message: str, make: Callable[[h5py.File, Path], None], tmp_path: Path
) -> None:
    outside = h5(tmp_path / "outside.h5", ones())
    (tmp_path / "in").mkdir()
    with h5py.File(tmp_path / "in" / "a.h5", "w") as file:
        file["coords"] = XY
        file["coords"].attrs.update(MARKS)
        make(file, outside)
    with pytest.raises(FeatureError, match=message) as refused:
        opened(tmp_path / "in")
    assert "\n" not in str(refused.value)


def test_coordinates_are_held_against_what_they_claim(tmp_path: Path) -> None:
    for wrong, message in (
        (np.zeros((COUNT, 3)), "coords of 20 x 3, expected"),
        (np.zeros(COUNT), "coords of 20, expected"),
        (np.array([[b"a", b"b"]] * COUNT), "expected numbers"),
    ):
        with pytest.raises(FeatureError, match=message):
            opened(h5(tmp_path / "a.h5", ones(), wrong))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = ones()
        file["coords"] = h5py.SoftLink("/features")
    with pytest.raises(FeatureError, match="'coords' is an external link"):
        opened(tmp_path / "a.h5")


@pytest.mark.parametrize("value", [np.zeros(1000), "x" * 5000, np.nan, -5.0, np.array([b"x"]), h5py.Empty("f4")])
def test_attributes_of_all_sorts_do_no_harm(value: Any, tmp_path: Path) -> None:
    path = h5(tmp_path / "a.h5", ones())
    with h5py.File(path, "a") as file:
        for name in (*MARKS, "overlap", "level0_width", "unit"):
            file["coords"].attrs[name] = value
    with pytest.raises(FeatureError, match="--feature-patch-um"):
        opened(path)
    with opened(path, patch_um=512 * MPP, unit="px") as bag:
        assert len(bag) == COUNT


def test_files_that_are_none_of_their_kind(tmp_path: Path) -> None:
    whole = h5(tmp_path / "b.h5", ones()).read_bytes()
    for name, data in (("a.h5", whole[: len(whole) // 2]), ("a.h5", b"x"), ("a.npz", b"PK"), ("a.pt", whole)):
        place = tmp_path / "in"
        place.mkdir(exist_ok=True)
        (place / name).write_bytes(data)
        with pytest.raises(FeatureError, match=name) as refused:
            opened(place)
        assert "\n" not in str(refused.value)
        (place / name).unlink()
    os.mkfifo(place / "a.h5")
    with pytest.raises(FeatureError, match="a pipe, socket or device"):
        opened(place / "a.h5")


class Harmful:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._mark}",)


def test_no_code_of_a_file_runs(tmp_path: Path) -> None:
    made = clam(tmp_path, frame(), only="pt")
    mark, path = tmp_path / "ran", tmp_path / "pt_files" / "a.pt"
    torch.save({"features": Harmful(mark)}, path)
    with pytest.raises(FeatureError, match="not a plain tensor"):
        opened(tmp_path)
    path.write_bytes(pickle.dumps(Harmful(mark)))
    with pytest.raises(FeatureError, match=r"not a file of PyTorch 1\.6 or later"):
        opened(tmp_path)
    torch.save(vectors(len(made.xy), 0), path)  # as TRIDENT's --save_features pt: an array, no tensor
    with pytest.raises(FeatureError, match=r"write it again with torch.save of the tensor"):
        opened(tmp_path)
    path.unlink()
    np.savez(tmp_path / "a.npz", features=np.array([Harmful(mark)], object))
    with pytest.raises(FeatureError, match="expected plain numbers"):
        opened(tmp_path)
    assert not mark.exists()


def test_tensors_are_held_against_what_they_claim(tmp_path: Path) -> None:
    made = clam(tmp_path, frame(), only="pt")
    path, count = tmp_path / "pt_files" / "a.pt", len(made.xy)
    for tensor, message in (
        (torch.ones(1, 1).expand(count, 1 << 15), "which it does not contain"),
        (torch.ones(DIMENSIONS, count).T, "which it does not contain"),
        (torch.ones(count, DIMENSIONS, dtype=torch.int8), "no tensor of floating point numbers"),
        (torch.ones(count, DIMENSIONS).to_sparse(), "no tensor of floating point numbers|not a plain tensor"),
        (torch.ones(count - 1, DIMENSIONS), "coordinates for"),
        ({"weights": torch.ones(3)}, "no tensor of floating point numbers"),
    ):
        torch.save(tensor, path)
        with pytest.raises(FeatureError, match=message):
            opened(tmp_path)
    torch.save(torch.ones(count, DIMENSIONS), path, _use_new_zipfile_serialization=False)
    with pytest.raises(FeatureError, match=r"not a file of PyTorch 1\.6"):
        opened(tmp_path)
    torch.save(torch.ones(count, DIMENSIONS), path)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    packed.replace(path)
    with pytest.raises(FeatureError, match=r"not a tensor as torch.save writes it"):
        opened(tmp_path)


def test_a_wrong_checksum_is_told(tmp_path: Path) -> None:
    slide2vec(tmp_path / "a", frame())
    slide2vec(tmp_path / "b", frame(), packed=True)
    for path in (tmp_path / "a" / "tile_embeddings" / "a.pt", tmp_path / "b" / "tile_embeddings" / "a.npz"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(FeatureError, match=r"checksum|CRC|decompress|damaged"):
            opened(path.parent.parent)


def test_numpy_files_are_held_against_what_they_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide2vec(tmp_path, frame())
    path = tmp_path / "tiles" / "a.coordinates.npz"

    def claiming(shape: str) -> None:
        header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(800)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.npy", data)
            archive.writestr("y.npy", data)

    for shape, message in (
        ("(1000000000000,)", "which the file does not contain"),
        ("(10, 10)", "expected a number for each patch"),
        ("(-1,)", "which the file does not contain"),
        ("(100,)", "100 coordinates for"),
    ):
        claiming(shape)
        with pytest.raises(FeatureError, match=message):
            opened(tmp_path)
    monkeypatch.setattr(feature_arrays, "MAX_PATCHES", 50)
    with pytest.raises(FeatureError, match=r"expected a number for each patch|expected at most 50 patches"):
        opened(tmp_path)


def test_descriptions_beside_coordinates(tmp_path: Path) -> None:
    slide2vec(tmp_path, frame())
    about = tmp_path / "tiles" / "a.coordinates.meta.json"
    said = json.loads(about.read_text())
    about.write_text("[" * 10_000)
    with pytest.raises(FeatureError, match="what lies beside it cannot be read"):
        opened(tmp_path)
    about.write_text(json.dumps({**said, "artifact": {"coordinate_space": "um"}}))
    with pytest.raises(FeatureError, match="--feature-unit"):
        opened(tmp_path)
    about.write_text(json.dumps({**said, "slide": {"dimensions": [9_000, 14_000]}}))
    with pytest.raises(FeatureError, match="--feature-axes"):
        opened(tmp_path)
    about.unlink()
    (tmp_path / "tile_embeddings" / "a.meta.json").unlink()
    with pytest.raises(FeatureError, match="--feature-patch-um"):
        opened(tmp_path)


def test_micrometres_of_other_pixels_are_noted(tmp_path: Path) -> None:
    stamp(tmp_path, frame())
    with opened(tmp_path) as bag:
        assert bag.notes == ()
    with open_features(tmp_path, frame(9_500, 15_000, mpp=0.25)) as bag:
        assert any("not whole pixels of 0.25 um" in note for note in bag.notes)


@pytest.mark.parametrize("level", [0, 1, 5])
def test_rows_of_atlaspatch_tell_sizes_where_no_attribute_does(level: int, tmp_path: Path) -> None:
    rows = np.concatenate([XY, np.full((COUNT, 2), 128), np.full((COUNT, 1), level)], axis=1)
    rows[3, 2:4] = 64
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("features")["uni"] = ones()
        file["coords"] = rows
    if level == 5:
        with pytest.raises(FeatureError, match="--feature-patch-um"):
            opened(tmp_path)
        return
    with opened(tmp_path) as bag:
        np.testing.assert_array_equal(bag.boxes[2:4, 2:], np.array([[128, 128], [64, 64]]) * 4**level)


def test_stamp_of_an_unknown_unit_is_refused(tmp_path: Path) -> None:
    made = stamp(tmp_path, frame())
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["unit"] = "furlong"
    with pytest.raises(FeatureError, match="--feature-unit"):
        opened(tmp_path)
    with opened(tmp_path, unit="um") as bag:
        np.testing.assert_allclose(bag.boxes[:, 1::-1], made.xy, atol=1)
