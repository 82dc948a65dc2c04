"""Features made by `encode`: `explain` goes on from them, other programs get them, and their mean is a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray

from tests.runs import SMALL, contents, rows_of, stored, toy_file
from tests.synthetic import corrupt_tile, write_marker_slide
from tests.test_mil_given_features import write_seeing
from wsi_gradcam.api import encode, explain, validate
from wsi_gradcam.cam.facts import BagFacts
from wsi_gradcam.cam.targets import Target
from wsi_gradcam.errors import BagSizeError, ConfigError, ResumeError, StoreError
from wsi_gradcam.export import export
from wsi_gradcam.mil.aggregators import load_aggregator
from wsi_gradcam.mil.attribution import explain_bag
from wsi_gradcam.mil.feature_files import open_features
from wsi_gradcam.mil.features import SlideFrame
from wsi_gradcam.mil.spec import read_slide_model, refuse_large_bag, whole_bag_bytes
from wsi_gradcam.run import bags

SLIDES = ("a.tif", "b.tif")
SETTINGS: dict[str, Any] = {**SMALL, "bag_method": "integrated_gradients"}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small slides of different sizes."""
    folder = tmp_path_factory.mktemp("archive")
    for name, height, colour in zip(SLIDES, (360, 200), ((0, 255, 0), (255, 0, 0)), strict=True):
        write_marker_slide(folder / name, height, 500, mpp=0.25, markers=[(100, 200)], marker_px=16, colour=colour)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide-level model with an encoder."""
    return write_seeing(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def explained(archive: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one go."""
    out = tmp_path_factory.mktemp("explained") / "out"
    explain(archive, model, out, **SETTINGS)
    return out


@pytest.fixture(scope="module")
def encoded(archive: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features alone."""
    out = tmp_path_factory.mktemp("encoded") / "out"
    encode(archive, model, out, **SMALL)
    return out


def features_of(out: Path, name: str = "a.tif") -> NDArray[Any]:
    """The features of a slide."""
    return array_of(out / name, "features")


def array_of(folder: Path, array: str) -> NDArray[Any]:
    """An array of a slide's features.zarr."""
    group: Any = zarr.open_group(folder / "features.zarr", mode="r")
    return np.asarray(group[array][:])


def copied(out: Path, to: Path) -> Path:
    """A copy of results."""
    for name, data in contents(out).items():
        place = to / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes((out / name).read_bytes() if name == "slides.csv" else data)
    return to


def test_encode_makes_the_features_of_explain_and_nothing_else(explained: Path, encoded: Path) -> None:
    for name in SLIDES:
        np.testing.assert_array_equal(features_of(encoded, name), features_of(explained, name))
        assert sorted(p.name for p in (encoded / name).iterdir()) == [
            "cams.zarr",
            "features.zarr",
            "manifest",
            "tissue.png",
        ]
    assert {row["status"] for row in rows_of(encoded).values()} == {"ok"}
    assert validate(encoded) == []


@pytest.mark.slow
def test_workers_leave_the_same_features(archive: Path, model: Path, encoded: Path, tmp_path: Path) -> None:
    encode(archive, model, tmp_path / "out", workers=2, **SMALL)
    assert contents(tmp_path / "out") == contents(encoded)


def test_what_is_encoded_is_not_encoded_again(
    archive: Path, model: Path, encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stopped run the rest is done, and the same bytes are left."""
    whole, calls = bags._keep, iter([0, 0, 0])

    def keep(*arguments: Any) -> None:
        if next(calls, None) is None:
            raise StoreError("disk full")
        whole(*arguments)

    monkeypatch.setattr(bags, "_keep", keep)
    with pytest.raises(StoreError):
        encode(archive, model, tmp_path / "out", **SMALL)
    made: list[int] = []

    def counted(context: Any, entry: Any, span: int, *rest: Any) -> None:
        made.append(span)
        whole(context, entry, span, *rest)

    monkeypatch.setattr(bags, "_keep", counted)
    encode(archive, model, tmp_path / "out", **SMALL)
    assert contents(tmp_path / "out") == contents(encoded)
    before = len(made)
    assert before < 7
    encode(archive, model, tmp_path / "out", **SMALL)
    assert len(made) == before


def test_explain_goes_on_from_the_features(
    archive: Path, model: Path, encoded: Path, explained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No patch is encoded again, whatever the targets and methods, and results are those of one run."""
    out = copied(encoded, tmp_path / "out")

    def refuse(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(bags, "_keep", refuse)
    outcome = explain(archive, model, out, **SETTINGS)
    assert [record.status for record in outcome.records] == ["ok", "ok"], outcome.records
    assert validate(out) == []
    assert contents(out) == contents(explained)
    other = explain(
        archive, model, copied(encoded, tmp_path / "other"), target=["tumour"], method="hirescam", **SETTINGS
    )
    assert [record.status for record in other.records] == ["ok", "ok"], other.records


def test_features_of_other_patches_are_not_taken(archive: Path, model: Path, encoded: Path, tmp_path: Path) -> None:
    """It is said what differs, and nothing is touched."""
    out = copied(encoded, tmp_path / "out")
    before = contents(out)
    with pytest.raises(ResumeError, match=r"overlap: 0.0 there, 0.5 now"):
        explain(archive, model, out, overlap=0.5, **SETTINGS)
    assert contents(out) == before


def test_encode_leaves_explained_slides_alone(archive: Path, model: Path, explained: Path) -> None:
    before = contents(explained)
    with pytest.raises(ResumeError, match="export --to trident"):
        encode(archive, model, explained, **SMALL)
    assert contents(explained) == before


def test_a_model_of_patches_encodes_without_its_head(archive: Path, encoded: Path, tmp_path: Path) -> None:
    encode(archive / "a.tif", toy_file(tmp_path, "encoder"), tmp_path / "out", **SMALL)
    np.testing.assert_array_equal(features_of(tmp_path / "out"), features_of(encoded))


def test_float16_and_what_cannot_be_encoded(archive: Path, model: Path, encoded: Path, tmp_path: Path) -> None:
    encode(archive, model, tmp_path / "half", feature_precision="float16", **SMALL)
    np.testing.assert_array_equal(features_of(tmp_path / "half"), features_of(encoded).astype(np.float16))
    with pytest.raises(ConfigError, match="there is nothing left to encode"):
        encode(archive, model, tmp_path / "out", features=tmp_path, **SMALL)


def test_unreadable_patches_are_told(model: Path, tmp_path: Path) -> None:
    wide = write_marker_slide(tmp_path / "wide.tif", 130, 1100, mpp=0.25, markers=[(100, 200)], marker_px=16)
    damaged = tmp_path / "damaged.tif"
    corrupt_tile(wide.path, damaged, 1, 0, 1)
    (record,) = encode(damaged, model, tmp_path / "out", max_unreadable=1.0, **SMALL).records
    assert record.status == "ok"
    assert 0 < record.unreadable < record.patches
    assert "patches are unreadable: " in record.error
    (done,) = export(tmp_path / "out", "clam", tmp_path / "clam")
    with h5py.File(done.paths[0]) as file:
        assert len(file["features"]) == record.patches - record.unreadable


# --- for other programs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["trident", "clam"])
@pytest.mark.parametrize("of", ["encoded", "explained"])
def test_features_are_exported_and_come_back(
    to: str, of: str, model: Path, archive: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """What is exported is read as that program's, and explained to the same relevance."""
    out: Path = request.getfixturevalue(of)
    done = export(out, to, tmp_path / "made")
    assert [each.error for each in done] == ["", ""]
    assert [each.paths[0].name for each in done] == ["a.h5", "b.h5"]
    with open_features(tmp_path / "made", SlideFrame("a.tif", (360, 500), (0.25, 0.25))) as bag:
        np.testing.assert_array_equal(bag.features[:], features_of(out))
        np.testing.assert_array_equal(bag.boxes[:, 1::-1], stored(out / "a.tif", "xy"))
        assert (bag.boxes[:, 2:] == 64).all()
        assert [note for note in bag.notes if "another order than CLAM" not in note] == []  # ours is row by row
    if of == "explained" and to == "trident":
        explain(archive, model, tmp_path / "again", features=tmp_path / "made", method="none", **SETTINGS)
        for name in SLIDES:
            mine, theirs = (array_of(place / name, "relevance") for place in (out, tmp_path / "again"))
            np.testing.assert_array_equal(mine, theirs)


def test_what_has_no_features_says_so(archive: Path, tmp_path: Path) -> None:
    explain(archive / "a.tif", toy_file(tmp_path, "pooled_linear"), tmp_path / "out", **SMALL)
    with pytest.raises(ConfigError, match="no slide has features"):
        export(tmp_path / "out", "trident", tmp_path / "made")


# --- the archive's mean as baseline ----------------------------------------------------------------------------------


def relevance_from(model: Path, features: NDArray[Any], baseline: NDArray[Any]) -> NDArray[np.float64]:
    """Integrated gradients of a bag from a baseline, by the function alone."""
    network = load_aggregator(read_slide_model(model)).network.double()
    targets = [Target("normal", 0), Target("tumour", 1)]
    return explain_bag(network, features, targets, ["integrated_gradients"], baseline=baseline).relevance[
        "integrated_gradients"
    ]


@pytest.mark.slow
def test_the_baseline_is_the_mean_of_all_patches_of_all_slides(
    archive: Path, model: Path, explained: Path, tmp_path: Path
) -> None:
    """Whatever the order of slides; on features made elsewhere too; and it is part of what results depend on."""
    everything = np.concatenate([features_of(explained, name) for name in SLIDES]).astype(np.float64)
    paths = [archive / name for name in SLIDES]
    mean = {**SETTINGS, "bag_baseline": "mean"}
    explain(paths, model, tmp_path / "one", **mean)
    explain(paths[::-1], model, tmp_path / "two", workers=2, **mean)
    export(explained, "trident", tmp_path / "made")
    explain(archive, model, tmp_path / "given", features=tmp_path / "made", method="none", **mean)
    for name in SLIDES:
        expected = relevance_from(model, features_of(explained, name), everything.mean(axis=0))
        for out in ("one", "two", "given"):
            np.testing.assert_allclose(array_of(tmp_path / out / name, "relevance")[:, 0], expected, atol=1e-6)
    assert validate(tmp_path / "one") == []
    before = contents(tmp_path / "one")
    assert [r.skipped for r in explain(paths, model, tmp_path / "one", **mean).records] == [True, True]
    assert contents(tmp_path / "one") == before
    with pytest.raises(ResumeError, match="baseline"):
        explain(paths, model, tmp_path / "one", **SETTINGS)
    with pytest.raises(ResumeError, match="baseline"):
        explain(paths[0], model, tmp_path / "given", features=tmp_path / "made", method="none", **mean)


# --- bags that are seen at once --------------------------------------------------------------------------------------


def test_a_bag_that_memory_does_not_hold_is_refused_when_its_slide_is_planned(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bytes, before a patch is encoded; the next command looks again."""
    folder = tmp_path / "transmil"
    seeing = write_seeing(folder)
    torch.save(transmil_state(12), folder / "abmil.pt")
    seeing.write_text(seeing.read_text().replace("source: abmil", "source: transmil"))
    encoding: list[Any] = []
    monkeypatch.setattr(bags, "_keep", lambda *a: encoding.append(a))
    monkeypatch.setattr("wsi_gradcam.mil.spec.psutil.virtual_memory", lambda: type("V", (), {"available": 1000})())
    (record,) = explain(archive / "a.tif", seeing, tmp_path / "out", **SETTINGS).records
    assert record.status == "failed"
    assert "a bag of 48 patches needs about" in record.error
    assert "bytes of memory with this aggregator, but only 1,000 are free" in record.error
    assert not record.lasting
    assert not encoding
    monkeypatch.undo()
    (record,) = explain(archive / "a.tif", seeing, tmp_path / "out", **SETTINGS).records
    assert record.status == "ok", record.error


def transmil_state(length: int) -> dict[str, torch.Tensor]:
    """A small TransMIL, two classes."""
    from tests import bags as layers

    state = layers.transmil(layers.seeded())
    random = layers.seeded(1)
    layers.layer(state, "_fc1.0", layers.V, length, random)
    layers.layer(state, "_fc2", 2, layers.V, random)
    return state


def test_the_estimate_of_memory_is_that_of_the_bag(tmp_path: Path) -> None:
    """Of aggregators in chunks there is none; of others it grows, and large bags lose no patch one by one."""
    facts = BagFacts("encoder", 12, (), (0.0, 100.0, 1000.0))
    checked = whole_bag_bytes(facts.whole, 100, 12, 2)
    assert checked == 100 * 100 + 1000 + 100 * 12 * 8 * 4
    with pytest.raises(BagSizeError, match="one_removed: 2,001 patches"):
        refuse_large_bag(2001, 0, ("integrated_gradients", "one_removed"), "a.svs: ")
