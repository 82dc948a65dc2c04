"""Features exported for TRIDENT and CLAM: read back by each format's rule, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.feature_formats import frame, vectors
from wsi_gradcam.errors import ConfigError, FeatureError, StoreError
from wsi_gradcam.mil.feature_files import open_features, write_clam, write_trident
from wsi_gradcam.mil.features import FeatureBag


def opened(place: Path, **flags: Any) -> FeatureBag:
    return open_features(place, frame(), **flags)


def bag_of(count: int = 40, side: float = 426.34) -> tuple[np.ndarray, np.ndarray]:
    boxes = np.array([(side * (i % 8), side * (i // 8), side, side) for i in range(count)])
    return vectors(count, 3, np.float16), boxes


def test_trident_reads_back_what_is_exported(tmp_path: Path) -> None:
    features, boxes = bag_of()
    for name in ("a.h5", "b.h5"):
        write_trident(tmp_path / name, features, boxes, frame(), patch_px=224, stride_px=224, mpp=0.5, encoder="toy")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5", "b.h5"]
    with h5py.File(tmp_path / "a.h5") as file:
        marks, coords = dict(file["coords"].attrs), file["coords"][:]
        np.testing.assert_array_equal(file["features"][:], features)
        assert file["features"].attrs["encoder"] == "toy"
    # As its WSIPatcher computes what it reads of the slide.
    source, target = 10 / marks["level0_magnification"], 10 / marks["target_magnification"]
    assert round(marks["patch_size"] * (target / source)) == 426 == marks["patch_size_level0"]
    assert (marks["level0_width"], marks["level0_height"], marks["overlap"], marks["name"]) == (14_000, 9_000, 0, "a")
    assert coords.dtype == np.int64
    assert_same(tmp_path / "a.h5", features, boxes)


def test_clam_reads_back_what_is_exported(tmp_path: Path) -> None:
    features, boxes = bag_of()
    for name in ("a.h5", "b.h5"):
        write_clam(tmp_path / name, features, boxes, frame())
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    with h5py.File(tmp_path / "a.h5") as file:
        assert (file["features"].dtype, file["coords"].dtype) == (np.float32, np.int32)
        marks = dict(file["coords"].attrs)
    assert (marks["patch_level"], marks["patch_size"], tuple(marks["downsample"])) == (0, 426, (1, 1))
    assert tuple(marks["level_dim"]) == (14_000, 9_000)
    assert_same(tmp_path / "a.h5", features, boxes)


def assert_same(path: Path, features: np.ndarray, boxes: np.ndarray) -> None:
    with opened(path) as bag:
        np.testing.assert_array_equal(np.asarray(bag.features, np.float32), features.astype(np.float32))
        np.testing.assert_allclose(bag.boxes, boxes, atol=0.51)
        assert bag.notes == ()


def test_an_export_with_overlap(tmp_path: Path) -> None:
    features, boxes = bag_of(side=426.34)
    boxes[:, :2] *= 0.5
    write_trident(tmp_path / "a.h5", features, boxes, frame(), patch_px=224, stride_px=112, mpp=0.5, encoder="toy")
    assert_same(tmp_path / "a.h5", features, boxes)


def test_an_export_that_breaks_off_leaves_what_was_there(tmp_path: Path) -> None:
    features, boxes = bag_of()
    place = tmp_path / "a.h5"
    write_clam(place, features, boxes, frame())
    before = place.read_bytes()

    class Failing:
        shape, dtype = features.shape, features.dtype

        def __getitem__(self, key: Any) -> Any:
            raise FeatureError("cut short")

    with pytest.raises(FeatureError):
        write_clam(place, Failing(), boxes, frame())
    assert place.read_bytes() == before
    assert list(tmp_path.iterdir()) == [place]
    with pytest.raises(StoreError, match="there is a file where a folder is needed"):
        write_clam(place / "b.h5", features, boxes, frame())


def test_patches_that_the_formats_cannot_hold(tmp_path: Path) -> None:
    features, boxes = bag_of()
    boxes[:, 2] *= 2
    with pytest.raises(ConfigError, match="square patches of one size"):
        write_clam(tmp_path / "a.h5", features, boxes, frame())
