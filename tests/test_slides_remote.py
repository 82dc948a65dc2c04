"""Slides behind URLs: the same patches as the file, few bytes, and what goes wrong on a network."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.servers import BUCKET, CREDENTIALS, Traffic, counting, put_folder, s3_server, web_server
from tests.slides_in_memory import read_batches
from tests.synthetic import corrupt_tile, write_marker_slide
from tests.test_slides_ome_zarr_reader import write as write_zarr
from tests.test_slides_tiff_reader import noise, write_ome
from wsi_gradcam.errors import SlideAccessError, SlideFormatError, SlideNotFoundError, SlideReadError
from wsi_gradcam.geometry import Region
from wsi_gradcam.io import object_stores
from wsi_gradcam.run import failures
from wsi_gradcam.slides import Slide, open_slide, read_region, remote, tiff_reader
from wsi_gradcam.slides.base import LocalFile
from wsi_gradcam.tissue import choose_patches, patch_grid
from wsi_gradcam.tissue.masks import slide_masks

MOST_SHARE = 1.02  # of the bytes of the tiles that are needed, in all
PATCH = (224, 224)


@dataclass
class Place:
    """Where a test puts slides: `put(file or folder)` returns the URL."""

    put: Callable[[Path], str]
    traffic: Traffic


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def s3(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with counting(s3_url) as server:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": server.url}.items():
            monkeypatch.setenv(name, value)

        def put(path: Path) -> str:
            key = f"{path.parent.name}/{path.name}"
            put_folder(s3_url, path, key)
            return f"s3://{BUCKET}/{key}"

        yield Place(put, server.traffic)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Place]:
    folder = tmp_path / "www"
    folder.mkdir()
    with web_server(folder) as server:

        def put(path: Path) -> str:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
            return f"{server.url}/{path.name}"

        yield Place(put, server.traffic)


@pytest.fixture(params=["s3", "web"])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up at once."""
    monkeypatch.setattr(object_stores, "_retry_config", lambda patience_s: {"max_retries": 0})


def zarr_of(folder: Path, version: str, **options: Any) -> Path:
    return write_zarr(folder / f"a{version}.ome.zarr", np.moveaxis(noise(230, 310), -1, 0), version=version, **options)


KINDS: dict[str, Callable[[Path, Path], Path]] = {
    "aperio": lambda folder, data: data / "slides/aperio/CMU-1-Small-Region.svs",
    "jpeg": lambda folder, data: (
        write_marker_slide(
            folder / "jpeg.tif",
            704,
            1104,
            mpp=(0.25, 0.3),
            markers=[(100, 200)],
            marker_px=60,
            glass_px=90,
            downsamples=(2, 4),
            compression="jpeg",
        ).path
    ),
    "ome-tiff": lambda folder, data: write_ome(
        folder / "a b.ome.tif", noise(300, 400), PhysicalSizeX=0.25, PhysicalSizeY=0.5
    ),
    "ome-zarr 0.4": lambda folder, data: zarr_of(folder, "0.4"),
    "ome-zarr 0.5": lambda folder, data: zarr_of(folder, "0.5"),
    "sharded": lambda folder, data: zarr_of(folder, "0.5", shards=(3, 128, 200)),
}


def assert_same(found: Slide, expected: Slide) -> None:
    """All levels whole, and patches on no grid at several mpp, also beyond the edges."""
    known = replace(expected.info, path="", digest="")
    assert replace(found.info, path="", digest="") == known
    for number, level in enumerate(expected.info.levels):
        whole = Region(0, 0, level.height, level.width)
        np.testing.assert_array_equal(found.read_level(number, whole), expected.read_level(number, whole))
    mpp_y, mpp_x = expected.info.mpp_yx
    for factor in (1, 1.37, 2.6):
        mpp = mpp_y * factor, mpp_x * factor
        for y, x in ((-20, 31), (33.5, 77.25), (150, 200)):
            patch, known_patch = (read_region(slide, y, x, 90, 80, mpp) for slide in (found, expected))
            np.testing.assert_array_equal(patch, known_patch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_remote_slide_is_the_file(kind: str, place: Place, shared_data: Path, tmp_path: Path) -> None:
    path = KINDS[kind](tmp_path, shared_data)
    with closing(open_slide(place.put(path))) as found, closing(open_slide(path)) as expected:
        assert_same(found, expected)


def tissue_of(slide: Slide) -> npt.NDArray[np.int64]:
    """Where the patches with tissue are, as a run finds them: by the thumbnail."""
    masks = slide_masks(slide)
    size = slide.info.height, slide.info.width
    grid = patch_grid(size, slide.info.mpp_yx, PATCH, slide.info.mpp_yx[0], PATCH)
    return choose_patches(grid, masks.tissue, 0.5, 1 << 15, masks.pen, masks.glass).yx


def read_tissue(slide: Slide) -> None:
    mpp = slide.info.mpp_yx[0]
    for batch in read_batches(slide, tissue_of(slide), PATCH, mpp, 16, 2):
        assert not batch.causes
    slide.close()


@pytest.fixture
def needed(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """The ranges that are read of files on the disk from here on."""
    ranges: set[tuple[int, int]] = set()
    plain = LocalFile.read_many

    def read_many(file: LocalFile, wanted: Any) -> Any:
        ranges.update(wanted)
        return plain(file, wanted)

    monkeypatch.setattr(LocalFile, "read_many", read_many)
    return ranges


@pytest.mark.parametrize("cache_bytes", [32 << 20, 1 << 20])
def test_nothing_but_tiles_is_fetched_and_each_once(
    cache_bytes: int, place: Place, shared_data: Path, needed: set[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From opening, over the thumbnail that tells tissue, to the last patch; also where few pixels are kept."""
    monkeypatch.setattr(tiff_reader, "CACHE_BYTES", cache_bytes)
    path = shared_data / "slides/aperio/CMU-1-Small-Region.svs"
    read_tissue(open_slide(path, 0.499, reader="tiff"))
    read_tissue(open_slide(place.put(path)))
    tiles = sum(count for _, count in needed)
    assert tiles > 1_200_000
    assert tiles < place.traffic.total() < MOST_SHARE * tiles
    assert place.traffic.twice() <= 2 * remote.BLOCK_BYTES  # tiles stand beside headers


def test_a_pyramid_with_little_tissue_costs_little(place: Place, tmp_path: Path, needed: set[tuple[int, int]]) -> None:
    path = write_marker_slide(
        tmp_path / "a.tif",
        3000,
        4000,
        mpp=0.25,
        markers=[(1000, 2000)],
        marker_px=60,
        glass_px=1000,
        downsamples=(4, 16),
        compression="jpeg",
    ).path
    read_tissue(open_slide(path, reader="tiff"))
    read_tissue(open_slide(place.put(path)))
    tiles = sum(count for _, count in needed)
    assert tiles < 0.8 * path.stat().st_size
    assert place.traffic.total() < MOST_SHARE * tiles


@pytest.mark.parametrize("shards", [None, (3, 512, 500)])
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_chunks_are_fetched_once(version: str, shards: Any, place: Place, tmp_path: Path) -> None:
    if version == "0.4" and shards:
        pytest.skip("Zarr 2 has no shards")
    data = noise(1100, 1300) // 8 + 120
    path = tmp_path / "a.ome.zarr"
    write_zarr(path, np.moveaxis(data, -1, 0), version=version, levels=1, **({"shards": shards} if shards else {}))
    chunks = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and file.suffix != ".json")
    with closing(open_slide(place.put(path))) as slide:
        opened = place.traffic.total()
        yx = np.mgrid[0:1100:100, 0:1300:100].reshape(2, -1).T
        for batch in read_batches(slide, yx, PATCH, 0.5, 16, 2):
            assert not batch.causes
    assert opened < 0.01 * chunks
    assert place.traffic.total() < MOST_SHARE * chunks
    assert place.traffic.twice() < 0.01 * chunks


def test_threads_that_want_the_same_tiles_fetch_them_once(place: Place, tmp_path: Path) -> None:
    path = write_marker_slide(tmp_path / "a.tif", 700, 700, mpp=0.25, markers=[(9, 9)], marker_px=9).path
    with closing(open_slide(place.put(path))) as slide, ThreadPoolExecutor(16) as pool:
        before = len(place.traffic.sent)
        regions = [Region(y, x, 300, 300) for y in (0, 50, 200, 400) for x in (0, 60, 210, 390)]
        found = list(pool.map(lambda region: slide.read_level(0, region), regions))
    with closing(open_slide(path)) as local:
        for region, pixels in zip(regions, found, strict=True):
            np.testing.assert_array_equal(pixels, local.read_level(0, region))
    assert len(place.traffic.sent) > before
    assert place.traffic.twice() <= 2 * remote.BLOCK_BYTES


# --- what goes wrong ---


def test_a_bad_tile_is_its_own_matter(place: Place, tmp_path: Path) -> None:
    slide = write_marker_slide(
        tmp_path / "whole.tif", 800, 800, mpp=0.25, markers=[(100, 200)], marker_px=60, compression="deflate"
    )
    corrupt_tile(slide.path, tmp_path / "a.tif", 0, 1, 2, damage="unreadable")
    corrupt_tile(tmp_path / "a.tif", tmp_path / "b.tif", 0, 0, 0, damage="missing")
    with closing(open_slide(place.put(tmp_path / "b.tif"))) as found:
        with pytest.raises(SlideReadError, match=r"b.tif: level 0, x 512, y 256, 256 x 256 px cannot be decoded"):
            found.read_level(0, Region(500, 700, 20, 20))
        with pytest.raises(SlideReadError, match="a tile is missing from the file"):
            found.read_level(0, Region(0, 0, 20, 20))
        np.testing.assert_array_equal(found.read_level(0, Region(0, 256, 256, 400)), slide.level0[:256, 256:656])


def test_a_missing_or_damaged_chunk_is_its_own_matter(place: Place, tmp_path: Path) -> None:
    path = zarr_of(tmp_path, "0.5")
    for channel in range(3):
        (path / f"0/c/{channel}/0/1").unlink()
    (path / "0/c/1/1/0").write_bytes(b"damaged")
    with closing(open_slide(place.put(path))) as slide:
        with pytest.raises(SlideReadError, match="has no data: a chunk is missing"):
            slide.read_level(0, Region(0, 150, 20, 20))
        with pytest.raises(SlideReadError, match="cannot be decoded"):
            slide.read_level(0, Region(100, 10, 20, 60))


@pytest.mark.parametrize("kind", ["jpeg", "sharded"])
def test_a_network_that_is_lost_fails_the_slide_and_no_patch(
    kind: str, place: Place, impatient: None, shared_data: Path, tmp_path: Path
) -> None:
    slide = open_slide(place.put(KINDS[kind](tmp_path, shared_data)))
    place.traffic.fails = lambda number, target: 0
    with pytest.raises(SlideAccessError, match=r"cannot be read from its server .*run the same command again"):
        list(read_batches(slide, np.array([[0, 0], [100, 100]]), (64, 64), 0.5, 2, 2))
    place.traffic.fails = lambda number, target: None  # and is back
    assert slide.read_level(0, Region(0, 0, 64, 64)).any()
    slide.close()


@pytest.mark.parametrize("kind", ["aperio", "jpeg", "ome-tiff", "ome-zarr 0.4", "ome-zarr 0.5", "sharded"])
def test_a_network_that_is_lost_while_opening_is_no_damage(
    kind: str, place: Place, impatient: None, shared_data: Path, tmp_path: Path
) -> None:
    url = place.put(KINDS[kind](tmp_path, shared_data))
    open_slide(url).close()
    requests = len(place.traffic.sent)
    for lost in range(requests):
        place.traffic.sent.clear()
        place.traffic.fails = lambda number, target, lost=lost: 503 if number >= lost else None  # type: ignore[misc]
        with pytest.raises(SlideAccessError, match="cannot be read from its server"):
            open_slide(url)


def test_a_moment_of_trouble_is_not_noticed(place: Place, tmp_path: Path) -> None:
    path = write_marker_slide(tmp_path / "a.tif", 700, 700, mpp=0.25, markers=[(9, 9)], marker_px=9).path
    url = place.put(path)
    place.traffic.fails = lambda number, target: (None, 503, 0)[number % 3]
    with closing(open_slide(url)) as slide, closing(open_slide(path)) as local:
        whole = Region(0, 0, 700, 700)
        np.testing.assert_array_equal(slide.read_level(0, whole), local.read_level(0, whole))


@pytest.mark.parametrize("name", ["gone.svs", "gone.ome.zarr", "gone"])
def test_what_is_not_there_is_named(name: str, place: Place, shared_data: Path) -> None:
    url = place.put(shared_data / "slides/aperio/CMU-1-Small-Region.svs").rpartition("/")[0]
    with pytest.raises(SlideNotFoundError, match=f"{name}: .*check the URL"):
        open_slide(f"{url}/{name}")


def test_a_bucket_that_is_not_there_is_named(s3: Place) -> None:
    with pytest.raises(SlideNotFoundError, match=r"^s3://no-such-bucket/a.svs: no such bucket; check the URL and the"):
        open_slide("s3://no-such-bucket/a.svs")


@pytest.mark.parametrize("status", [401, 403])
def test_without_access_the_mend_is_told(status: int, s3: Place, shared_data: Path) -> None:
    s3.traffic.fails = lambda number, target: status
    with pytest.raises(SlideAccessError, match="access was refused; set AWS_ACCESS_KEY_ID"):
        open_slide(f"s3://{BUCKET}/a.svs")
    with pytest.raises(SlideAccessError, match="access was refused; set AWS_ACCESS_KEY_ID"):
        open_slide(f"s3://{BUCKET}/a.ome.zarr")


def test_user_and_password_are_used_and_never_shown(web: Place, tmp_path: Path) -> None:
    url = web.put(write_marker_slide(tmp_path / "a.tif", 300, 300, mpp=0.25, markers=[(9, 9)], marker_px=9).path)
    web.traffic.user = "me:secret word"
    signed = url.replace("://", "://me:secret%20word@") + "?signature=hidden"
    with closing(open_slide(signed)) as slide:
        assert slide.info.path == url
        slide.read_level(0, Region(0, 0, 99, 99))
    assert {sent.target for sent in web.traffic.sent} == {"/a.tif?signature=hidden"}
    for wrong in (signed.replace("me:", "you:"), signed.replace("a.tif", "b.tif").replace("me:", "you:")):
        with pytest.raises(SlideAccessError, match="access was refused; check the user and password") as caught:
            open_slide(wrong)
        assert not {"secret", "hidden"} & set(str(caught.value).replace("%", " ").replace("?", " ").split())
    web.traffic.fails = lambda number, target: 400
    with pytest.raises(SlideAccessError, match="400") as failed:
        open_slide(signed)
    assert "secret" not in str(failed.value)
    assert "hidden" not in str(failed.value)


def test_a_server_that_ignores_ranges_is_refused(web: Place, tmp_path: Path) -> None:
    url = web.put(write_marker_slide(tmp_path / "a.tif", 300, 300, mpp=0.25, markers=[(9, 9)], marker_px=9).path)
    web.traffic.ignores_range = True
    with pytest.raises(SlideAccessError, match=r"a\.tif: the server ignores Range requests, .*copy it to a local disk"):
        open_slide(url)


def test_a_server_that_is_not_there_is_named(impatient: None) -> None:
    with pytest.raises(SlideAccessError, match=r"^http://127.0.0.1:9/a.svs: cannot be read from its server"):
        open_slide("http://127.0.0.1:9/a.svs")


def test_a_file_that_shrinks_is_no_damage(web: Place, impatient: None, tmp_path: Path) -> None:
    path = write_marker_slide(tmp_path / "a.tif", 700, 700, mpp=0.25, markers=[(9, 9)], marker_px=9).path
    url = web.put(path)
    slide = open_slide(url)
    served = tmp_path / "www/a.tif"
    served.write_bytes(served.read_bytes()[: served.stat().st_size // 2])
    with pytest.raises(SlideAccessError, match=r"a\.tif: "):
        slide.read_level(0, Region(0, 0, 700, 700))


@pytest.mark.parametrize("url", ["gs://bucket/a.svs", "file:///a.svs", "https://", "s3:///a.svs"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(SlideAccessError, match="expected"):
        open_slide(url)


def test_credentials_in_an_s3_url_are_refused_and_not_shown() -> None:
    with pytest.raises(SlideAccessError, match=r"^s3://bucket/a.svs: expected .*AWS_ACCESS_KEY_ID") as caught:
        open_slide("s3://key:secret@bucket/a.svs")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("reader", ["openslide", "picture"])
def test_readers_of_files_refuse_urls(reader: str) -> None:
    with pytest.raises(SlideFormatError, match=f"reader '{reader}' reads only files; .*copy the file to a local disk"):
        open_slide("https://host/a.svs", reader=reader)


def test_what_is_neither_tiff_nor_zarr_is_refused(place: Place, tmp_path: Path) -> None:
    for name, content in (("a.mrxs", b"\xff\xd8\xff\xe0 JPEG"), ("b.svs", b"II*\0 but no TIFF" + bytes(99))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SlideFormatError, match=f"{name}: .*cop"):
            open_slide(place.put(tmp_path / name))
    (tmp_path / "c.svs").write_bytes(b"")
    with pytest.raises(SlideFormatError, match=r"c\.svs: empty, expected a slide"):
        open_slide(place.put(tmp_path / "c.svs"))


def test_a_zarr_group_need_not_be_named_so(place: Place, tmp_path: Path) -> None:
    path = zarr_of(tmp_path, "0.5").rename(tmp_path / "image")
    with closing(open_slide(place.put(path))) as slide:
        assert slide.info.vendor == "ome-zarr"


def test_digests_tell_contents_apart(place: Place, tmp_path: Path) -> None:
    digests = []
    for number, kind in enumerate(("jpeg", "ome-tiff", "ome-zarr 0.5")):
        for change in (False, True):
            folder = tmp_path / f"{number}{change}"
            folder.mkdir()
            path = KINDS[kind](folder, tmp_path)
            if change:
                file = sorted(path.glob("0/c/*/*/*"))[-1] if path.is_dir() else path
                content = bytearray(file.read_bytes())
                content[-1] ^= 1
                file.write_bytes(content)
            url = place.put(path)
            for _ in range(2):
                with closing(open_slide(url)) as slide:
                    digests.append(slide.info.digest)
            if path.is_dir():
                shutil.rmtree(tmp_path / "www" / path.name, ignore_errors=True)
    assert digests[::2] == digests[1::2]
    assert len(set(digests)) == 6


@pytest.mark.parametrize("fault", ["hangs", "drops", "refuses", "503"])
def test_a_url_that_fails_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """In the time that the documentation says, here 4 s, whatever the server does; and a run tries no second time."""
    monkeypatch.setattr(object_stores, "PATIENCE_S", 4.0)
    with faulty_server(fault) as url:
        began = time.monotonic()
        with pytest.raises(SlideAccessError, match="cannot be read from its server") as caught:
            open_slide(f"{url}/a.tif")
        assert time.monotonic() - began < 4 + 3  # what is slow here
    assert failures.is_transient(caught.value)  # for the next run
    assert not failures.may_succeed_soon(caught.value)


@contextmanager
def faulty_server(fault: str) -> Iterator[str]:
    """A server on loopback that answers nothing, closes connections, says 503, or is not there."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ExitStack() as opened:
        port = listening.getsockname()[1]
        if fault == "refuses":
            listening.close()
        else:
            thread = threading.Thread(target=_serve, args=(listening, fault, opened), daemon=True)
            thread.start()
        yield f"http://127.0.0.1:{port}"


def _serve(listening: socket.socket, fault: str, opened: ExitStack) -> None:
    with suppress(OSError):  # until it is closed
        while True:
            connection, _ = listening.accept()
            if fault == "503":
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            if fault == "hangs":
                opened.enter_context(connection)
            else:
                connection.close()
