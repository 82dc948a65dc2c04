"""Files of features, weights and masks, and slides in many files, that stand for far more than they hold."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests.bombs import BOMBS, GIB, Make, Random, bomb, side


class Room:
    """Bytes that a pickle has none of."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (self.size,)


def saved(path: Path, pickled: bytes, packing: int = zipfile.ZIP_STORED, data: bytes = b"") -> Path:
    """Write a file of torch.save by hand."""
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        if data:
            archive.writestr("archive/data/0", data)
    return path


def tensor_pickle(names: int = 1, count: int = 4) -> bytes:
    """Return the pickle of a dict of tensors that all are the first numbers of one storage, with many names."""
    import io

    import torch

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, torch.UntypedStorage | torch.storage.TypedStorage):
                return ("storage", torch.FloatStorage, "0", "cpu", count)
            return None

    buffer = io.BytesIO()
    storage: Any = torch.zeros(4)
    Pickler(buffer, 2).dump({f"p{i}.a.b.c.weight": storage for i in range(names)} if names > 1 else storage)
    return buffer.getvalue()


def in_torch(kind: str) -> None:
    """Enter files of PyTorch, to be opened as features or as weights."""

    def enter(name: str) -> Callable[[Make], Make]:
        return bomb(f"{kind}: PyTorch, {name}")

    @enter("a bytearray of gigabytes")
    def room(folder: Path, rng: Random) -> Path:
        found = {"features": Room(int(rng.uniform(2, 6) * GIB))}
        return saved(folder / "a.pt", pickle.dumps(found, 2))

    @enter("a bytearray of gigabytes in the older format")
    def old_room(folder: Path, rng: Random) -> Path:
        written: tuple[Any, ...] = (
            0x1950A86A20F9469CFC6C,
            1001,
            {"little_endian": True},
            Room(int(rng.uniform(2, 6) * GIB)),
            [],
        )
        (folder / "a.pt").write_bytes(b"".join(pickle.dumps(part, 2) for part in written))
        return folder / "a.pt"

    @enter("packed numbers")
    def packed(folder: Path, rng: Random) -> Path:
        count = side(rng, 7.5, 7.8)
        return saved(folder / "a.pt", tensor_pickle(1, count), zipfile.ZIP_DEFLATED, bytes(4 * count))

    @enter("a packed description")
    def packed_pickle(folder: Path, rng: Random) -> Path:
        return saved(folder / "a.pt", b"\x80\x02" + b"N0" * side(rng, 7.5, 7.8) + b"N.", zipfile.ZIP_DEFLATED)

    @enter("a long description")
    def long_pickle(folder: Path, rng: Random) -> Path:
        return saved(folder / "a.pt", b"\x80\x02" + b"N0" * side(rng, 7.3, 7.7) + b"N.")

    @enter("very many names")
    def names(folder: Path, rng: Random) -> Path:
        return saved(folder / "a.pt", tensor_pickle(side(rng, 4.6, 4.8)), data=bytes(16))

    @enter("very many members")
    def members(folder: Path, rng: Random) -> Path:
        path = saved(folder / "a.pt", tensor_pickle(), data=bytes(16))
        return many_members(path, side(rng, 5.3, 5.6))

    @enter("lists in lists")
    def deep(folder: Path, rng: Random) -> Path:
        depth = side(rng, 5, 5.5)
        return saved(folder / "a.pt", b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".")


def many_members(path: Path, count: int) -> Path:
    """Add so many empty members to a ZIP file, quickly."""
    with zipfile.ZipFile(path) as archive:
        end = archive.start_dir
        central = path.read_bytes()[end:-22]
        kept = len(archive.infolist())
    local = b"".join(
        struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 20, 0, 0, 0, 33, 0, 0, 0, 7, 0) + b"%07d" % i for i in range(count)
    )
    entry = struct.Struct("<4sHHHHHHIIIHHHHHII")
    more = b"".join(
        entry.pack(b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, 7, 0, 0, 0, 0, 0, end + 37 * i) + b"%07d" % i
        for i in range(count)
    )
    begin, total, size = end + len(local), kept + count, len(central) + len(more)
    wide = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, total, total, size, begin)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, begin + size, 1)
    tail = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(path.read_bytes()[:end] + local + central + more + wide + locator + tail)
    return path


for _kind in ("features", "weights"):
    in_torch(_kind)


def h5(folder: Path, count: int, dimensions: int = 2) -> Any:
    """Return an open file of features and coordinates, packed."""
    file = h5py.File(folder / "a.h5", "w")
    more: dict[str, Any] = {"compression": "gzip", "compression_opts": 1}
    chunk = min(count, (1 << 22) // dimensions)
    file.create_dataset("features", (count, dimensions), "f2", chunks=(chunk, dimensions), **more)
    coords = file.create_dataset("coords", (count, 2), "i8", chunks=(min(count, 1 << 20), 2), **more)
    coords.attrs["patch_size_level0"] = 512
    for start in range(0, count, chunk):
        file["features"][start : start + chunk] = 0
    for start in range(0, count, 1 << 20):
        coords[start : start + (1 << 20)] = 0
    return file


@bomb("features: HDF5, millions of patches at one place")
def one_place(folder: Path, rng: Random) -> Path:
    h5(folder, side(rng, 6.3, 6.69)).close()
    return folder / "a.h5"


@bomb("features: HDF5, millions of patches")
def millions(folder: Path, rng: Random) -> Path:
    count = side(rng, 6.3, 6.69)
    with h5(folder, count) as file:
        for start in range(0, count, 1 << 20):
            at = np.arange(start, min(count, start + (1 << 20)))
            file["coords"][at[0] : at[-1] + 1] = np.stack([at % 2000 * 512, at // 2000 * 512], 1)
    return folder / "a.h5"


@bomb("features: HDF5, one vast packed chunk")
def vast_chunk(folder: Path, rng: Random) -> Path:
    wide = int(rng.uniform(0.6, 0.99) * (1 << 16))
    with h5(folder, 2048) as file:
        del file["features"]
        made = file.create_dataset("features", (2048, wide), "f2", chunks=(2048, wide), compression="gzip")
        data = zlib.compress(bytes(2048 * wide * 2), 1)
        made.id.write_direct_chunk((0, 0), data)
    return folder / "a.h5"


@bomb("features: HDF5, very many features")
def many_features(folder: Path, rng: Random) -> Path:
    with h5(folder, 9) as file:
        del file["features"]
        group = file.create_group("features")
        for number in range(side(rng, 4.3, 4.6)):
            group[f"{number}"] = np.zeros((9, 2), np.float16)
    return folder / "a.h5"


@bomb("features: HDF5, groups in groups")
def deep_groups(folder: Path, rng: Random) -> Path:
    with h5(folder, 9) as file:
        del file["features"]
        group = file
        for _ in range(side(rng, 3.8, 4.2)):
            group = group.create_group("features")
    return folder / "a.h5"


@bomb("features: HDF5, attributes of megabytes")
def long_attributes(folder: Path, rng: Random) -> Path:
    with h5(folder, 9) as file:
        for name in ("unit", "feat_type", "patch_size", "overlap"):
            file["coords"].attrs.create(name, "a" * 60_000)
        file.attrs.create("patch_level", np.zeros(8000))
        for number in range(side(rng, 3.5, 3.8)):
            file.attrs[f"a{number}"] = 1
    return folder / "a.h5"


def npz(folder: Path, packing: int, rows: int, columns: int) -> Path:
    """Write features of zeros, packed."""
    import io

    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f2", "fortran_order": False, "shape": (rows, columns)})
    left = rows * columns * 2
    archive = zipfile.ZipFile(folder / "a.npz", "w", packing, compresslevel=1)
    with archive, archive.open("features.npy", "w", force_zip64=True) as member:
        member.write(head.getvalue())
        while left:
            left -= member.write(bytes(min(left, 1 << 24)))
    at = np.arange(rows) * 512.0
    np.savez(folder / "a.coordinates.npz", x=at % 2**20, y=at // 2**20 * 512, tile_size_lv0=np.array(512))
    return folder


@bomb("features: NumPy, packed zeros")
def packed_zeros(folder: Path, rng: Random) -> Path:
    return npz(folder, zipfile.ZIP_DEFLATED, 1 << 14, int(rng.uniform(1e4, 2e4)))


@bomb("features: NumPy, zeros by LZMA")
def lzma_zeros(folder: Path, rng: Random) -> Path:
    return npz(folder, zipfile.ZIP_LZMA, 1 << 13, int(rng.uniform(17e3, 2e4)))


@bomb("features: NumPy, very many members")
def many_arrays(folder: Path, rng: Random) -> Path:
    many_members(npz(folder, zipfile.ZIP_STORED, 9, 2) / "a.npz", side(rng, 5.3, 5.6))
    return folder


# Masks


def png(width: int, height: int, bits: int, kind: int) -> bytes:
    """Return a picture of zeros."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    row = bytes(1 + -(-width * samples * bits // 8))
    packer = zlib.compressobj(1)
    parts = [packer.compress(row * min(256, height - start)) for start in range(0, height, 256)]
    parts.append(packer.flush())
    palette = chunk(b"PLTE", bytes(768)) if kind == 3 else b""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + palette + chunk(b"IDAT", b"".join(parts)) + chunk(b"IEND", b"")


for _name, _bits, _colour in (
    ("gray", 8, 0),
    ("one bit", 1, 0),
    ("RGBA of 16 bits", 16, 6),
    ("RGB of 16 bits", 16, 2),
    ("RGBA", 8, 6),
    ("a palette", 8, 3),
):

    def _picture(folder: Path, rng: Random, bits: int = _bits, colour: int = _colour) -> Path:
        wide = int(rng.integers(7900, 8000))
        (folder / "a.png").write_bytes(png(wide, wide, bits, colour))
        return folder / "a.png"

    BOMBS[f"mask: the largest PNG, {_name}"] = _picture


@bomb("mask: a PNG of one row")
def one_row(folder: Path, rng: Random) -> Path:
    (folder / "a.png").write_bytes(png(side(rng, 7.5, 7.8), 1, 16, 6))
    return folder / "a.png"


@bomb("mask: a TIFF of one tile a million times")
def repeated_tile(folder: Path, rng: Random) -> Path:
    from tests import bombs_tiff  # noqa: F401 - enters it

    return BOMBS["tiff: one tile shown a million times"](folder, rng)


@bomb("mask: a TIFF of many colours")
def many_labels(folder: Path, rng: Random) -> Path:
    """Each pixel has a label of its own."""
    import tifffile

    wide = int(rng.integers(2000, 3000))
    data = np.arange(wide * wide, dtype=np.uint32).view(np.uint8).reshape(wide, wide, 4)[..., :3]
    tifffile.imwrite(folder / "a.tif", data, tile=(512, 512), photometric="rgb", compression="zlib")
    return folder / "a.tif"


# Slides of several files


def mirax(folder: Path, slidedat: str) -> Path:
    """Write a slide of MIRAX that has nothing but its configuration."""
    (folder / "a").mkdir()
    (folder / "a/Slidedat.ini").write_text(slidedat)
    (folder / "a/Index.dat").write_bytes(b"01.02" + b"0" * 32 + bytes(64))
    (folder / "a.mrxs").write_bytes(b"no picture")
    return folder / "a.mrxs"


GENERAL = "[GENERAL]\nSLIDE_VERSION = 01.02\nSLIDE_ID = {id}\nIMAGENUMBER_X = {x}\nIMAGENUMBER_Y = {y}\n"
GENERAL += "OBJECTIVE_MAGNIFICATION = 20\nCameraImageDivisionsPerSide = {divisions}\n"


@bomb("mrxs: vast numbers")
def vast_mirax(folder: Path, rng: Random) -> Path:
    big = (1 << 31) - 1 - side(rng, 1, 4)
    text = GENERAL.format(id="0" * 32, x=big, y=big, divisions=1)
    text += f"[HIERARCHICAL]\nHIER_COUNT = {big}\nNONHIER_COUNT = {big}\nINDEXFILE = Index.dat\n"
    text += f"HIER_0_NAME = Slide zoom level\nHIER_0_COUNT = {big}\n"
    return mirax(folder, text + f"[DATAFILE]\nFILE_COUNT = {big}\nFILE_0 = Data0000.dat\n")


@bomb("mrxs: a long configuration")
def long_mirax(folder: Path, rng: Random) -> Path:
    text = GENERAL.format(id="0" * 32, x=9, y=9, divisions=1)
    return mirax(folder, text + "".join(f"K{i} = {i}\n" for i in range(side(rng, 5.8, 6.2))))


@bomb("mrxs: a configuration of gigabytes")
def sparse_mirax(folder: Path, rng: Random) -> Path:
    path = mirax(folder, GENERAL.format(id="0" * 32, x=9, y=9, divisions=1))
    with (folder / "a/Slidedat.ini").open("r+b") as file:
        file.truncate(int(rng.uniform(2, 9) * GIB))
    return path


# DICOM


def element(group: int, number: int, kind: bytes, data: bytes) -> bytes:
    """Return an element in explicit little endian."""
    data += b"\0" * (len(data) % 2)
    head = struct.pack("<HH2s", group, number, kind)
    if kind in (b"OB", b"OW", b"SQ", b"UN", b"UT"):
        return head + struct.pack("<HI", 0, len(data)) + data
    return head + struct.pack("<H", len(data)) + data


def dicom(folder: Path, more: bytes, rows: int = 9000, name: str = "a.dcm") -> Path:
    """Write a slide of one frame, and other elements before its pixels."""
    syntax, storage = b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.5.1.4.1.1.77.1.6"
    meta = element(2, 1, b"OB", b"\0\1") + element(2, 2, b"UI", storage) + element(2, 3, b"UI", b"1.2.3")
    meta += element(2, 0x10, b"UI", syntax)
    body = element(8, 8, b"CS", b"ORIGINAL\\PRIMARY\\VOLUME\\NONE") + element(8, 0x16, b"UI", storage)
    body += element(8, 0x18, b"UI", b"1.2.3") + element(0x20, 0xE, b"UI", b"1.2.9") + element(0x20, 0x52, b"UI", b"1.4")
    body += element(0x28, 2, b"US", struct.pack("<H", 3)) + element(0x28, 8, b"IS", b"1")
    body += element(0x28, 0x10, b"US", struct.pack("<H", 256)) + element(0x28, 0x11, b"US", struct.pack("<H", 256))
    sizes = element(0x48, 6, b"UL", struct.pack("<I", rows)) + element(0x48, 7, b"UL", struct.pack("<I", rows))
    pixels = struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0)
    pixels += struct.pack("<HHI", 0xFFFE, 0xE000, 4) + b"\xff\xd8\xff\xd9" + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    head = element(2, 0, b"UL", struct.pack("<I", len(meta)))
    (folder / name).write_bytes(bytes(128) + b"DICM" + head + meta + body + more + sizes + pixels)
    return folder / name


@bomb("dicom: sequences in sequences")
def deep_sequences(folder: Path, rng: Random) -> Path:
    start = struct.pack("<HH2sHI", 0x40, 0x555, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    end = struct.pack("<HHIHHI", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    depth = side(rng, 4, 5)
    return dicom(folder, start * depth + end * depth)


@bomb("dicom: very many elements")
def many_elements(folder: Path, rng: Random) -> Path:
    return dicom(folder, b"".join(element(0x41, i % 65_000, b"CS", b"A ") for i in range(side(rng, 5.5, 6))))


@bomb("dicom: very many items")
def many_items(folder: Path, rng: Random) -> Path:
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0)
    return dicom(folder, element(0x5200, 0x9230, b"SQ", item * side(rng, 5.8, 6.2)))


@bomb("dicom: a vast picture")
def vast_picture(folder: Path, rng: Random) -> Path:
    return dicom(folder, b"", rows=(1 << 32) - 1 - side(rng, 1, 4))


@bomb("dicom: very many files")
def many_files(folder: Path, rng: Random) -> Path:
    path = dicom(folder, b"")
    for number in range(side(rng, 3, 3.3)):
        (folder / f"{number}.dcm").hardlink_to(path)
    return path


# Model files


@bomb("config: sets and pairs in YAML")
def odd_tags(folder: Path, rng: Random) -> Path:
    (folder / "a.yaml").write_text("overlap: !!python/object/apply:os.system ['touch /tmp/x']\n")
    return folder / "a.yaml"


@bomb("aggregator: very many layers behind other names")
def many_layers(folder: Path, rng: Random) -> Path:
    from safetensors.numpy import save_file

    one = np.zeros((2, 2), np.float32)
    save_file({f"p{i}.a{i}.b{i}.weight": one for i in range(side(rng, 3.7, 4))}, folder / "w.safetensors")
    return aggregator(folder, "abmil")


@bomb("aggregator: a transformer of vast shapes")
def vast_transformer(folder: Path, rng: Random) -> Path:
    count = side(rng, 9, 10)
    head = json.dumps(
        {"pos_layer.proj.weight": {"dtype": "F32", "shape": [1, count], "data_offsets": [0, 4 * count]}}
    ).encode()
    with (folder / "w.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + 4 * count)
    return aggregator(folder, "transmil")


def aggregator(folder: Path, kind: str) -> Path:
    """Write the file of a slide-level model."""
    (folder / "model.yaml").write_text(
        f"name: a\naggregator:\n  source: {kind}\n  weights: w.safetensors\nclasses: [a, b]\n"
    )
    return folder / "model.yaml"
