"""OME-Zarr images that unpack to gigabytes, or claim more pixels, chunks and levels than any slide has."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from imagecodecs import zstd_encode

from tests.bombs import BOMBS, GIB, Make, Random, bomb, side

# What unpacks to `size` zeros.


def zstd_zeros(size: int, told: bool = False) -> bytes:
    """Blocks of one repeated byte (RFC 8878): four bytes stand for 128 KiB. The frame tells its size, if `told`."""
    whole, rest = divmod(size, 1 << 17)
    sizes = [1 << 17] * whole + [rest] * bool(rest)
    blocks = b"".join(
        ((n << 3) | 1 << 1 | (i == len(sizes) - 1)).to_bytes(3, "little") + b"\0" for i, n in enumerate(sizes)
    )
    head = b"\xe0" + struct.pack("<Q", size) if told else b"\x00\x38"  # a window of 128 KiB
    return b"\x28\xb5\x2f\xfd" + head + blocks


def deflate_zeros(size: int, wbits: int) -> bytes:
    """A stream of zlib (15) or gzip (31), of a piece that is repeated."""
    piece = 1 << 24
    raw = zlib.compressobj(9, wbits=-15)
    block = raw.compress(bytes(piece)) + raw.flush(zlib.Z_FULL_FLUSH)
    end = zlib.compressobj(9, wbits=-15).flush()
    body = block * -(-size // piece) + end
    if wbits == 31:
        return gzip.compress(b"")[:10] + body + struct.pack("<II", 0, size & 0xFFFFFFFF)
    return b"\x78\xda" + body + b"\0\0\0\0"


def lz4_zeros(size: int) -> bytes:
    """As numcodecs writes it, after four bytes of the size: 255 bytes an each."""
    told = min(size, (1 << 31) - 1)
    return struct.pack("<i", told) + b"\x1f\0\x01\0" + b"\xff" * (told // 255) + b"\0" + b"\x50" + bytes(5)


def blosc_zeros(size: int) -> bytes:
    """Only a header that tells a size, with a body that is none."""
    told = min(size, (1 << 31) - 1)
    return struct.pack("<BBBBIII", 2, 1, 0x21, 1, told, 1 << 18, 1 << 12) + bytes((1 << 12) - 16)


PACKED: dict[str, Callable[[int], bytes]] = {
    "zstd": zstd_zeros,
    "zstd-told": lambda size: zstd_zeros(size, told=True),
    "gzip": lambda size: deflate_zeros(size, 31),
    "zlib": lambda size: deflate_zeros(size, 15),
    "lz4": lz4_zeros,
    "blosc": blosc_zeros,
    "bz2": lambda size: bz2.compress(bytes(1 << 24)) * (size >> 24),
    "lzma": lambda size: lzma.compress(bytes(1 << 24)) * (size >> 24),
}
OF_ZARR_3 = ("zstd", "zstd-told", "gzip", "blosc")


# OME-Zarr of either version, written without zarr.


@dataclass(frozen=True)
class Image:
    """An OME-Zarr image of colours, rows and columns.

    Attributes:
        codec: name of what chunks are packed by, with its settings.
        shard: shape of the files where chunks lie in shards; of Zarr 3.
        more: keys that replace those of the array's metadata.
        paths: of the levels; all have the same shape.
    """

    version: int = 2
    shape: tuple[int, ...] = (3, 1024, 1024)
    chunk: tuple[int, ...] = (3, 256, 256)
    fill: int | None = 0
    codec: Any = None
    shard: tuple[int, ...] | None = None
    paths: tuple[str, ...] = ("0",)
    filters: Any = None
    more: tuple[tuple[str, Any], ...] = ()

    def write(self, path: Path) -> Path:
        """Write metadata, and no chunks."""
        path.mkdir(parents=True, exist_ok=True)
        datasets = [
            {"path": name, "coordinateTransformations": [{"type": "scale", "scale": [1.0, 0.5, 0.5]}]}
            for name in self.paths
        ]
        axes = [{"name": "c", "type": "channel"}] + [
            {"name": name, "type": "space", "unit": "micrometer"} for name in "yx"
        ]
        scales = [{"axes": axes, "datasets": datasets, "version": "0.4" if self.version == 2 else "0.5"}]
        array = json.dumps(self._array())
        if self.version == 2:
            (path / ".zgroup").write_text('{"zarr_format": 2}')
            (path / ".zattrs").write_text(json.dumps({"multiscales": scales}))
        else:
            attributes = {"ome": {"version": "0.5", "multiscales": scales}}
            (path / "zarr.json").write_text(
                json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes})
            )
        for name in sorted(name for name in set(self.paths) if not {"", ".."} & set(name.split("/"))):
            (path / name).mkdir()
            (path / name / (".zarray" if self.version == 2 else "zarr.json")).write_text(array)
        return path

    def chunk_file(self, path: Path, place: tuple[int, ...] = (0, 0, 0), level: str = "0") -> Path:
        """Return where a chunk of a written image belongs; its folder is made."""
        parts = [str(i) for i in place]
        found = path / level / (".".join(parts) if self.version == 2 else "/".join(["c", *parts]))
        found.parent.mkdir(parents=True, exist_ok=True)
        return found

    def _array(self) -> dict[str, Any]:
        if self.version == 2:
            old: dict[str, Any] = {
                "zarr_format": 2,
                "shape": self.shape,
                "chunks": self.chunk,
                "dtype": "|u1",
                "order": "C",
                "fill_value": self.fill,
                "compressor": self.codec,
                "filters": self.filters,
            }
            return old | dict(self.more)
        codecs: list[Any] = [{"name": "bytes"}, *([self.codec] if self.codec else [])]
        if self.shard:
            index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
            settings = {"chunk_shape": self.chunk, "codecs": codecs, "index_codecs": index, "index_location": "end"}
            codecs = [{"name": "sharding_indexed", "configuration": settings}]
        found: dict[str, Any] = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": self.shape,
            "data_type": "uint8",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.shard or self.chunk}},
            "chunk_key_encoding": {"name": "default"},
            "fill_value": self.fill,
            "codecs": codecs,
            "attributes": {},
        }
        return found | dict(self.more)


def codec_of(name: str, version: int) -> Any:
    """Return a codec as metadata name it."""
    plain = name.removesuffix("-told")
    known: dict[str, dict[str, Any]] = {
        "zstd": {"level": 3, **({"checksum": False} if version == 3 else {})},
        "gzip": {"level": 5},
        "zlib": {"level": 5},
        "blosc": {"cname": "lz4", "clevel": 5, "shuffle": 1 if version == 2 else "shuffle", "blocksize": 0},
        "bz2": {"level": 5},
        "lzma": {"format": 1, "check": -1, "preset": None, "filters": None},
    }
    settings = known.get(plain, {})
    if version == 2:
        return {"id": plain, **settings}
    return {"name": plain, "configuration": {**settings, **({"typesize": 1} if plain == "blosc" else {})}}


def packed_chunk(codec: str, version: int) -> Make:
    """Return a maker of images all of whose chunks unpack to gigabytes."""

    def make(folder: Path, rng: Random) -> Path:
        image = Image(version, codec=codec_of(codec, version))
        path = image.write(folder / "a.zarr")
        first = image.chunk_file(path)
        first.write_bytes(PACKED[codec](int(rng.uniform(2, 5) * GIB)))
        for row in range(4):
            for column in range(4):
                if row or column:
                    os.link(first, image.chunk_file(path, (0, row, column)))
        return path

    return make


for _version in (2, 3):
    for _codec in PACKED if _version == 2 else OF_ZARR_3:
        BOMBS[f"zarr {_version}: {_codec} chunk"] = packed_chunk(_codec, _version)


def imaged(name: str, draw: Callable[[Random, int], Image]) -> None:
    """Enter images of either version of which there are no chunks."""
    for version in (2, 3):
        BOMBS[f"zarr {version}: {name}"] = lambda folder, rng, version=version: draw(rng, version).write(  # type: ignore[misc]
            folder / "a.zarr"
        )


imaged("vast shape, fill", lambda rng, v: Image(v, (3, side(rng, 5.5, 12), side(rng, 5.5, 12)), (3, 512, 512), 255))
imaged("one row of 10^12", lambda rng, v: Image(v, (3, 1, side(rng, 11, 13)), (3, 1, 512), 255))
imaged(
    "tiny chunks", lambda rng, v: Image(v, (3, side(rng, 4, 5), side(rng, 4, 5)), (1, 1, int(rng.integers(1, 4))), 9)
)
imaged("chunks of one row", lambda rng, v: Image(v, (3, side(rng, 4, 5), side(rng, 4, 5)), (1, 1, 4096), 9))
imaged("huge chunk, fill", lambda rng, v: Image(v, (3, 2000, 2000), (3, side(rng, 4.5, 6), side(rng, 4.5, 6)), 255))
imaged("large chunk, fill", lambda rng, v: Image(v, (3, 16384, 16384), (3, 9000, int(rng.integers(8000, 9000))), 255))
imaged(
    "one chunk of 10^10", lambda rng, v: Image(v, (3, side(rng, 5, 5.5), side(rng, 5, 5.5)), (3, 1 << 18, 1 << 18), 7)
)
imaged("many levels", lambda rng, v: Image(v, fill=200, paths=("0",) * side(rng, 5, 5.5)))
imaged("many arrays", lambda rng, v: Image(v, fill=200, paths=tuple(f"{i}" for i in range(side(rng, 3.6, 4)))))
imaged("10^5 axes", lambda rng, v: Image(v, (3,) * side(rng, 5, 5.3), (3,) * 100_000, 200))
imaged("negative shape", lambda rng, v: Image(v, (3, -5, 100), (3, 256, 256), 200))
imaged("zero chunk", lambda rng, v: Image(v, (3, 500, 100), (3, 0, 256), 200))
imaged(
    "levels above", lambda rng, v: Image(v, fill=200, paths=("0", "../0", "/etc", "0/../0")[: int(rng.integers(2, 5))])
)


@bomb("zarr 3: shard of tiny chunks")
def tiny_in_shard(folder: Path, rng: Random) -> Path:
    across = int(rng.integers(1000, 3000))
    image = Image(3, (3, 8000, 8000), (1, 1, 1), 255, shard=(1, across, across))
    path = image.write(folder / "a.zarr")
    index = np.tile(np.array([0, 1], "<u8"), across * across)
    image.chunk_file(path).write_bytes(index.tobytes() + bytes(4))
    return path


@bomb("zarr 3: shard whose chunks are all of it")
def greedy_shard(folder: Path, rng: Random) -> Path:
    across, size = 64, int(rng.integers(100, 200)) << 20
    image = Image(3, (3, 8192, 8192), (3, 128, 128), 255, codec_of("zstd", 3), shard=(3, 8192, 8192))
    path = image.write(folder / "a.zarr")
    index = np.tile(np.array([0, size], "<u8"), across * across).tobytes()
    from google_crc32c import value as crc32c

    with image.chunk_file(path).open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(index + struct.pack("<I", crc32c(index)))
    return path


@bomb("zarr 3: shards in shards")
def nested_shards(folder: Path, rng: Random) -> Path:
    index = [{"name": "bytes", "configuration": {"endian": "little"}}]
    codecs: list[Any] = [{"name": "bytes"}]
    for _ in range(int(rng.integers(50, 150))):
        settings = {"chunk_shape": [3, 256, 256], "codecs": codecs, "index_codecs": index}
        codecs = [{"name": "sharding_indexed", "configuration": settings}]
    return Image(3, fill=200, more=(("codecs", codecs),)).write(folder / "a.zarr")


@bomb("zarr 3: shard's index packed")
def packed_index(folder: Path, rng: Random) -> Path:
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, codec_of("zstd", 3)]
    settings = {"chunk_shape": [3, 64, 64], "codecs": [{"name": "bytes"}], "index_codecs": index}
    image = Image(3, fill=200, more=(("codecs", [{"name": "sharding_indexed", "configuration": settings}]),))
    path = image.write(folder / "a.zarr")
    image.chunk_file(path).write_bytes(zstd_zeros(int(rng.uniform(2, 5) * GIB)))
    return path


# As large as is allowed, or nearly.
imaged(
    "most chunks of the coarsest", lambda rng, v: Image(v, (3, 105_000 + side(rng, 1, 3), 105_000), (1, 512, 512), 255)
)
imaged("most chunks of a level", lambda rng, v: Image(v, (3, 2_000_000, 1_000_000), (3, 512, 512), 255))


@bomb("zarr 3: largest chunks")
def largest_chunks(folder: Path, rng: Random) -> Path:
    high, wide = int(rng.integers(3000, 4096)), int(rng.integers(3000, 4096))
    image = Image(3, (3, 2 * high, 2 * wide), (3, high, wide), 9, codec_of("zstd", 3))
    path = image.write(folder / "a.zarr")
    first = image.chunk_file(path)
    first.write_bytes(zstd_encode(bytes([200]) * (3 * high * wide)))
    for place in ((0, 0, 1), (0, 1, 0), (0, 1, 1)):
        os.link(first, image.chunk_file(path, place))
    return path


def full_metadata(version: int) -> Make:
    """Return a maker of images whose levels' metadata are padded with lists."""

    def make(folder: Path, rng: Random) -> Path:
        paths = tuple(f"{i}" for i in range(int(rng.integers(40, 64))))
        padding: tuple[tuple[str, Any], ...] = (
            (("attributes", {"a": [[]] * int(rng.uniform(9e5, 1.3e6))}),) if version == 3 else ()
        )
        path = Image(version, fill=200, paths=paths, more=padding).write(folder / "a.zarr")
        if version == 2:
            for name in paths:
                (path / name / ".zattrs").write_text('{"a": [' + "[]," * int(rng.uniform(9e5, 1.3e6)) + "[]]}")
        return path

    return make


BOMBS["zarr 2: full metadata"] = full_metadata(2)
BOMBS["zarr 3: full metadata"] = full_metadata(3)


@bomb("zarr 2: full consolidated metadata")
def full_consolidated(folder: Path, rng: Random) -> Path:
    return _consolidated(folder, side(rng, 4, 4.1))


HARMFUL = ("pickle", "json2", "msgpack2", "vlen-utf8", "vlen-bytes", "vlen-array", "categorize", "pcodec", "zfpy")


def harmful(codec: str, where: str) -> Make:
    """Return a maker of images of Zarr 2 with a codec of objects, as the compressor, or among the filters."""

    def make(folder: Path, rng: Random) -> Path:
        of_objects = {"dtype": "|O", "fill_value": None} if rng.integers(2) else {}
        named = {"id": codec, **({"dtype": "|i2", "itemdtype": "|u1"} if codec.startswith("vlen") else {})}
        keys = {"compressor": named} if where == "compressor" else {"filters": [named]}
        image = Image(2, more=tuple({**of_objects, **keys}.items()))
        path = image.write(folder / "a.zarr")
        mark = folder / "RAN"
        image.chunk_file(path).write_bytes(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())
        return path

    return make


for _codec in HARMFUL:
    for _where in ("compressor", "filters"):
        BOMBS[f"zarr 2: {_codec} in {_where}"] = harmful(_codec, _where)


@bomb("zarr 3: numcodecs.pickle")
def pickle_in_zarr_3(folder: Path, rng: Random) -> Path:
    name = str(rng.choice(["numcodecs.pickle", "numcodecs.json2", "vlen-utf8", "numcodecs.bz2"]))
    codecs = [{"name": "bytes"}, {"name": name, "configuration": {}}]
    return Image(3, more=(("codecs", codecs),)).write(folder / "a.zarr")


@bomb("zarr 2: long metadata")
def long_metadata(folder: Path, rng: Random) -> Path:
    path = Image(2, fill=200).write(folder / "a.zarr")
    (path / ".zattrs").write_text("[" + "[]," * int(rng.uniform(1e7, 2e7)) + "[]]")
    return path


@bomb("zarr 3: long metadata")
def long_metadata_3(folder: Path, rng: Random) -> Path:
    path = Image(3, fill=200).write(folder / "a.zarr")
    (path / "0/zarr.json").write_text("[" + "[]," * int(rng.uniform(1e7, 2e7)) + "[]]")
    return path


@bomb("zarr 2: consolidated metadata of many arrays")
def consolidated(folder: Path, rng: Random) -> Path:
    return _consolidated(folder, side(rng, 5, 5.3))


def _consolidated(folder: Path, count: int) -> Path:
    path = Image(2, fill=200).write(folder / "a.zarr")
    group, array = json.loads((path / ".zgroup").read_text()), json.loads((path / "0/.zarray").read_text())
    entries = {".zgroup": group, ".zattrs": json.loads((path / ".zattrs").read_text())}
    entries |= {f"{i}/.zarray": array for i in range(count)}
    (path / ".zmetadata").write_text(json.dumps({"zarr_consolidated_format": 1, "metadata": entries}))
    return path


@bomb("zarr 2: metadata nested deeply")
def deep_metadata(folder: Path, rng: Random) -> Path:
    path = Image(2, fill=200).write(folder / "a.zarr")
    depth = side(rng, 3.5, 6)
    (path / ".zattrs").write_text("[" * depth + "]" * depth)
    return path


@bomb("zarr 2: a pipe as chunk")
def pipe_chunk(folder: Path, rng: Random) -> Path:
    image = Image(2, fill=200)
    path = image.write(folder / "a.zarr")
    os.mkfifo(image.chunk_file(path))
    return path


@bomb("zarr 3: a device as chunk")
def device_chunk(folder: Path, rng: Random) -> Path:
    image = Image(3, fill=200)
    path = image.write(folder / "a.zarr")
    image.chunk_file(path).symlink_to("/dev/zero")
    return path


@bomb("zarr 2: a pipe as metadata")
def pipe_metadata(folder: Path, rng: Random) -> Path:
    path = Image(2, fill=200).write(folder / "a.zarr")
    (path / "0/.zarray").unlink()
    os.mkfifo(path / "0/.zarray")
    return path


@bomb("zarr 2: chunk files of gigabytes")
def long_chunk(folder: Path, rng: Random) -> Path:
    image = Image(2, fill=200)
    path = image.write(folder / "a.zarr")
    with image.chunk_file(path).open("wb") as file:
        file.truncate(int(rng.uniform(4, 40) * GIB))
    return path


@bomb("zarr 3: odd second level")
def odd_level(folder: Path, rng: Random) -> Path:
    path = Image(3, fill=200, paths=("0", "1")).write(folder / "a.zarr")
    kind = {"data_type": {"name": "fixed_length_utf32", "configuration": {"length_bytes": 1 << 28}}, "fill_value": ""}
    array = json.loads((path / "1/zarr.json").read_text()) | kind
    (path / "1/zarr.json").write_text(json.dumps(array | {"shape": [3, 512, 512]}))
    return path
