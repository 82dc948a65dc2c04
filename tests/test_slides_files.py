"""Bytes of a file on a disk and behind a URL are the same bytes, however they are asked for."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.servers import web_server
from wsi_gradcam.slides import remote
from wsi_gradcam.slides.base import LocalFile, SlideFile, content_digest
from wsi_gradcam.slides.remote import BLOCK_BYTES, RemoteFile

SIZE = 10 * BLOCK_BYTES + 123
CONTENT = np.random.default_rng(0).bytes(SIZE)
ranges = st.lists(st.tuples(st.integers(0, SIZE + 5000), st.integers(1, 3 * BLOCK_BYTES)), max_size=8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalFile, RemoteFile]]:
    folder = tmp_path_factory.mktemp("www")
    (folder / "a.bin").write_bytes(CONTENT)
    with web_server(folder) as server, closing(LocalFile(folder / "a.bin")) as local:
        yield local, RemoteFile(f"{server.url}/a.bin")


@given(ranges)
def test_ranges_are_the_files(files: tuple[SlideFile, SlideFile], wanted: list[tuple[int, int]]) -> None:
    expected = [CONTENT[offset : offset + count] for offset, count in wanted]
    for file in files:
        assert file.size == SIZE
        assert list(file.read_many(wanted)) == expected


@given(ranges)
def test_streams_are_the_files(files: tuple[SlideFile, SlideFile], wanted: list[tuple[int, int]]) -> None:
    for file in files:
        with file.stream() as stream:
            for offset, count in wanted:
                assert stream.seek(offset) == offset
                assert stream.read(count) == CONTENT[offset : offset + count]
                back = min(7, stream.tell())
                assert stream.seek(-back, io.SEEK_CUR) == stream.tell()
            assert stream.seek(-5, io.SEEK_END) == SIZE - 5
            assert stream.read() == CONTENT[-5:]


def test_what_was_streamed_is_not_fetched_again_until_it_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(CONTENT)
    with web_server(tmp_path) as server:
        file = RemoteFile(f"{server.url}/a.bin")
        for _ in range(3):
            with file.stream() as stream:
                assert stream.read(3 * BLOCK_BYTES) == CONTENT[: 3 * BLOCK_BYTES]
        assert [(sent.start, sent.count) for sent in server.traffic.sent] == [
            (0, BLOCK_BYTES),
            (BLOCK_BYTES, 2 * BLOCK_BYTES),
        ]
        file.forget_headers()
        with file.stream() as stream:
            stream.read(3 * BLOCK_BYTES)
        assert len(server.traffic.sent) == 3


def test_a_stream_keeps_few_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_BLOCKS", 4)
    (tmp_path / "a.bin").write_bytes(CONTENT)
    with web_server(tmp_path) as server:
        file = RemoteFile(f"{server.url}/a.bin")
        with file.stream() as stream:
            assert stream.read(SIZE) == CONTENT
        assert file._blocks.currsize == 4


def test_ranges_with_small_gaps_are_one_request(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(CONTENT)
    with web_server(tmp_path) as server:
        file = RemoteFile(f"{server.url}/a.bin")
        file.read_many([(5000, 100), (5108, 100), (7000, 10), (5208, 50)])
        assert sorted((sent.start, sent.count) for sent in server.traffic.sent[1:]) == [(5000, 258), (7000, 10)]


def test_a_disk_that_fails_is_the_matter_of_a_range(files: tuple[LocalFile, RemoteFile]) -> None:
    good, bad = files[0].read_many([(0, 10), ((1 << 63) - 1, 10)])
    assert good == CONTENT[:10]
    assert isinstance(bad, OSError)


def test_a_local_digest_is_of_the_content(files: tuple[LocalFile, RemoteFile]) -> None:
    assert files[0].digest() == content_digest(Path(files[0].name))
    assert files[1].digest() == RemoteFile(files[1].name).digest() != files[0].digest()
