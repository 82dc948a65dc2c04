"""A result in an object store is read as one on a disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tests.made_results import Made, make, steps
from tests.servers import BUCKET, CREDENTIALS, put_folder, s3_server
from wsi_gradcam.errors import ResultError
from wsi_gradcam.export import export
from wsi_gradcam.results.run import find_result, open_result


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made") / "out", {"in/a.svs": Made((1500, 1300), steps((94, 82)))})


@pytest.fixture(scope="module")
def remote(local: Path) -> Iterator[str]:
    """The same result in a bucket."""
    with s3_server() as url, pytest.MonkeyPatch.context() as patch:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": url}.items():
            patch.setenv(name, value)
        put_folder(url, local, "runs/one")
        yield f"s3://{BUCKET}/runs/one"


def test_everything_is_as_on_a_disk(local: Path, remote: str) -> None:
    here, there = open_result(local), open_result(remote)
    assert there.out == remote
    assert there.ids == here.ids
    assert there.windows() == here.windows()
    one, other = here["in/a.svs"], there["in/a.svs"]
    assert other.status == "ok"
    assert other.channels == one.channels
    np.testing.assert_array_equal(other.heatmap("tumour").values, one.heatmap("tumour").values)
    np.testing.assert_array_equal(other.coverage().values, one.coverage().values)
    assert other.patches.equals(one.patches)


def test_windows_are_kept_in_the_bucket(remote: str) -> None:
    open_result(remote).windows()
    assert open_result(remote).folder.display.is_file()
    read: list[tuple[int, int]] = []
    open_result(remote).windows(lambda *count: read.append(count))
    assert read == []


def test_exports_are_the_same(local: Path, remote: str, tmp_path: Path) -> None:
    (here,), (there,) = export(local, "tiff", tmp_path / "a"), export(remote, "tiff", tmp_path / "b")
    np.testing.assert_array_equal(tifffile.imread(here.paths[0]), tifffile.imread(there.paths[0]))


def test_what_is_no_result_is_told(remote: str) -> None:
    with pytest.raises(ResultError, match="does not exist or is empty"):
        open_result(f"{remote}-none")
    with pytest.raises(ResultError, match=f"open {remote} and choose the slide"):
        open_result(f"{remote}/in")
    result, slide = find_result(f"{remote}/in/a.svs/heatmap.ome.zarr")
    assert result.out == remote
    assert slide is not None
    assert slide.id == "in/a.svs"
