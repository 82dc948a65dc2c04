"""Results of a stranger: whatever they claim, reading them takes little memory, and asks no other machine."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.limits import little_memory
from tests.made_results import Made, make, steps
from tests.viewer_runs import client
from wsi_gradcam.audit.plan import read_arrays, write_arrays
from wsi_gradcam.errors import SlideAccessError, SlideNotFoundError, StoreError, WsiGradcamError
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.results import slide as slide_module
from wsi_gradcam.results.overview import read_mask
from wsi_gradcam.results.run import open_result
from wsi_gradcam.results.slide import check_named
from wsi_gradcam.run.status import read_status
from wsi_gradcam.slides import open_slide

NAME = "a.svs"
SIZE = (1200, 900)
MEMORY = 700 << 20  # more than the threads that read need, and a fraction of what each of these claims
HUGE = 1 << 40


@pytest.fixture
def out(tmp_path: Path) -> Path:
    made = Made(SIZE, steps((75, 57)))
    return make(tmp_path / "out", {NAME: made})


def read_all(out: Path) -> None:
    """Read what any reader does: values, coverage, tables, and the spans of all."""
    slide = open_result(out)[NAME]
    whole = Region(0, 0, *slide.levels[0])
    for channel in slide.channels:
        slide.read(channel, 0, whole)
        slide.heatmap(channel.label)
    slide.read_coverage(0, whole)
    assert len(slide.patches) == slide.plan.patches
    assert slide.plan.spans
    assert slide.plan.blocks(0)


def test_sound_results_are_read_in_little_memory(out: Path) -> None:
    read_all(out)
    with little_memory(MEMORY):
        read_all(out)


def changed(path: Path, change: Callable[[Any], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def sparse(path: Path) -> None:
    """Make a file of a terabyte that takes no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(HUGE)


def zstd_bomb(size: int) -> bytes:
    """A frame of Zstandard (RFC 8878) of blocks that repeat one byte: 4 bytes for 128 KiB."""
    count = size >> 17
    blocks = b"".join(struct.pack("<I", (int(i == count - 1) | 1 << 1 | 1 << 20))[:3] + b"\0" for i in range(count))
    return b"\x28\xb5\x2f\xfd" + bytes([0xC0, 0x58]) + (count << 17).to_bytes(8, "little") + blocks


def put_bomb(out: Path) -> None:
    """Make a chunk of the heatmap unpack to 4 GB."""
    data, none = zstd_bomb(4 << 30), 2**64 - 1
    index = struct.pack("<32Q", 0, len(data), *[none] * 30)
    shard = out / NAME / "heatmap.ome.zarr/0/c/0/0/0"
    shard.write_bytes(data + index + struct.pack("<I", google_crc32c.value(index)))


def put_pipe(out: Path) -> None:
    shard = out / NAME / "heatmap.ome.zarr/0/c/0/0/0"
    shard.unlink()
    os.mkfifo(shard)


HEATMAP = f"{NAME}/heatmap.ome.zarr/0/zarr.json"


def set_codecs(out: Path, name: str, configuration: dict[str, Any]) -> None:
    def change(about: dict[str, Any]) -> None:
        inner = about["codecs"][0]["configuration"]["codecs"]
        inner[-1] = {"name": name, "configuration": configuration}

    changed(out / HEATMAP, change)


def set_chunks(out: Path) -> None:
    def change(about: dict[str, Any]) -> None:
        about["chunk_grid"]["configuration"]["chunk_shape"] = [1, 1 << 16, 1 << 16]
        about["codecs"][0]["configuration"]["chunk_shape"] = [1, 1 << 16, 1 << 16]

    changed(out / HEATMAP, change)


def set_table(out: Path, **columns: Any) -> None:
    path = out / NAME / "patches.parquet"
    table = pq.read_table(path)
    for name, values in columns.items():
        found = pa.array(values)
        at = table.column_names.index(name) if name in table.column_names else None
        table = table.append_column(name, found) if at is None else table.set_column(at, name, found)
    pq.write_table(table, path, compression="zstd")


def set_rows(out: Path) -> None:
    path = out / NAME / "patches.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table] * 2000), path)


def set_plan(**values: Any) -> Callable[[Path], None]:
    return lambda out: changed(out / NAME / "manifest/plan.json", lambda plan: plan.update(values))


def set_run(**values: Any) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        run = yaml.safe_load((out / "run.yaml").read_text())
        run["model"].update(values)
        (out / "run.yaml").write_text(yaml.safe_dump(run))

    return change


ATTACKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a chunk that unpacks to 4 GB": (put_bomb, "Destination buffer is too small"),
    "chunks of 16 GB": (set_chunks, "are too large"),
    "another codec": (
        lambda out: set_codecs(out, "gzip", {"level": 1}),
        "compressed with GzipCodec, unsupported",
    ),
    "a wider heatmap": (lambda out: changed(out / HEATMAP, lambda a: a.update(shape=[3, 75, 1 << 40])), "px, expected"),
    "metadata of a terabyte": (lambda out: sparse(out / HEATMAP), "bytes, expected at most"),
    "a shard of a terabyte": (
        lambda out: sparse(out / NAME / "heatmap.ome.zarr/0/c/0/0/0"),
        "bytes, expected at most|checksum|Checksum",
    ),
    "a pipe for a shard": (put_pipe, "a pipe, socket or device"),
    "a slide of light years": (set_plan(slide_px=[1 << 50, 1 << 50]), "height is 1125899906842624, expected"),
    "a slide of more blocks than any": (set_plan(slide_px=[1 << 26, 1 << 26], stride=1), "more than any slide has"),
    "a billion patches": (set_plan(patches=10**9), "patches is 1000000000, expected"),
    "spans of one patch": (set_plan(patches=30_000_000, span=1), "more than any slide has"),
    "no stride": (set_plan(stride=0), "stride is 0, expected"),
    "patches by name": (set_plan(patches="many"), "patches is many, expected"),
    "no mpp": (set_plan(slide_mpp=[0, 0.5]), "expected positive lengths"),
    "patches of 40000 px": (set_run(patch_px=[40_000, 40_000]), "patch_px is 40000, expected 1 to 8192"),
    "patches of no size": (set_run(patch_px=[-1, 32]), "patch_px is -1"),
    "a patch of kilometres": (set_run(mpp=1e9), r"mpp is 1000000000\.0, expected"),
    "more rows than patches": (set_rows, "has 80,000 rows, expected 40"),
    "long texts, once each": (
        lambda out: set_table(out, cause=["x" * (16 << 20)] * 40),
        "671,088,640 bytes of cause|unpacks to",
    ),
    "lists in a table": (lambda out: set_table(out, more=[[1] * 9] * 40), "columns, not those of wsi_gradcam: more"),
    "a table of a terabyte": (lambda out: sparse(out / NAME / "patches.parquet"), "bytes, expected at most"),
    "a run.yaml of a terabyte": (lambda out: sparse(out / "run.yaml"), "bytes, expected at most"),
    "a slides.csv of a terabyte": (lambda out: sparse(out / "slides.csv"), "bytes, expected at most"),
    "a slides.csv of one line": (
        lambda out: (out / "slides.csv").write_bytes((out / "slides.csv").read_bytes() + b"," * 50_000_000),
        "a line of more than 1,000,000 bytes",
    ),
    "a plan of a terabyte": (lambda out: sparse(out / NAME / "manifest/plan.json"), "bytes, expected at most"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_results_claim_costs_nothing(name: str, out: Path) -> None:
    read_all(out)  # all that is loaded once
    attack, said = ATTACKS[name]
    attack(out)
    with little_memory(MEMORY), pytest.raises((WsiGradcamError, ValueError, RuntimeError), match=said) as caught:
        read_all(out)
    assert not isinstance(caught.value, MemoryError)


def png_of(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    struct.pack_into(">II", data, 16, width, height)

    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    return bytes(data)


def test_pictures_that_claim_gigapixels_are_not_decoded(tmp_path: Path) -> None:
    (tmp_path / "tissue.png").write_bytes(png_of(6000, 6000))
    with little_memory(MEMORY), pytest.raises(WsiGradcamError, match=r"an image of 6000 x 6000 px, expected at most"):
        read_mask(tmp_path / "tissue.png")


def npz(path: Path, header: bytes, size: int = 0) -> LocalPath:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(size))
    return LocalPath(path)


def test_arrays_are_no_larger_than_what_holds_them(tmp_path: Path) -> None:
    sound = LocalPath(tmp_path / "sound.npz")
    write_arrays(sound, {"a": np.arange(3), "b": np.zeros((2, 3), np.float32)})
    assert {name: values.shape for name, values in read_arrays(sound).items()} == {"a": (3,), "b": (2, 3)}
    claim = b"{'descr': '<f8', 'fortran_order': False, 'shape': (100000000000,), }\n"
    packed = b"{'descr': '|u1', 'fortran_order': False, 'shape': (300000000,), }\n"
    for place in (npz(tmp_path / "a.npz", claim), npz(tmp_path / "b.npz", packed, 300_000_000)):
        with little_memory(MEMORY), pytest.raises(WsiGradcamError, match="damaged"):
            read_arrays(place)


def test_files_that_are_looked_at_often_are_read_up_to_a_size(out: Path) -> None:
    sparse(out / "status.json")
    with little_memory(MEMORY), pytest.raises(WsiGradcamError, match="bytes, expected at most"):
        read_status(LocalPath(out))
    sparse(out / "display.json")
    with little_memory(MEMORY):
        assert open_result(out).windows()


def name_slide(out: Path, path: str) -> None:
    table = out / "slides.csv"
    table.write_text(table.read_text().replace("/nowhere/slide.svs", path))


NETWORK = ["s3://other/a.svs", "http://169.254.169.254/latest", "https://me:key@host/a.svs", "//host/share/a.svs"]


@pytest.mark.parametrize("path", [*NETWORK, "file:///etc/passwd", "\\\\host\\share\\a.svs"])
def test_a_stranger_cannot_have_this_machine_ask_another(path: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def open_it(path: str, *_: object, **__: object) -> None:
        asked.append(path)
        raise SlideNotFoundError("asked")

    monkeypatch.setattr(slide_module, "open_slide", open_it)
    monkeypatch.setattr("wsi_gradcam.viewer.archive.open_slide", open_it)
    name_slide(out, path)
    with pytest.raises(SlideAccessError, match="on another machine, which is contacted only with --remote-slides"):
        open_result(out)[NAME].thumbnail()
    with client(out) as server:
        (listed,) = server.get("/api/slides").json()["slides"]
        answer = server.get(f"/api/slides/{listed['key']}").json()
        assert "--remote-slides" in answer["slide"]["problem"]
        assert "key@" not in str(answer)
    assert not asked
    with pytest.raises(SlideNotFoundError):
        open_result(out, remote_slides=True)[NAME].thumbnail()
    with client(out, remote_slides=True) as server:
        server.get(f"/api/slides/{listed['key']}")
    assert set(asked) == {path.replace("s3://other", "s3://anonymous@other")}  # without the user's credentials


def test_slides_beside_their_results_in_a_bucket_are_taken() -> None:
    check_named("s3://bucket/slides/a.svs", "s3://bucket/results", remote=False)
    for path in ("s3://bucket2/slides/a.svs", "https://bucket/a.svs"):
        with pytest.raises(SlideAccessError):
            check_named(path, "s3://bucket/results", remote=False)


@pytest.mark.parametrize("path", ["/proc/kmsg", "/dev/zero", "/sys/kernel/notes", "/../proc/self/mem"])
def test_files_of_the_system_are_no_slides(path: str) -> None:
    with pytest.raises(SlideAccessError, match="a system file"):
        check_named(path, "/out", remote=True)


def test_a_pipe_is_no_slide(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.svs")
    with pytest.raises(SlideNotFoundError, match=r"a\.svs: is not a regular file, expected a slide"):
        open_slide(tmp_path / "a.svs")


@pytest.mark.parametrize("label", [["a"], 7, None, {"a": 1}, "no method: a"])
def test_odd_names_of_channels_are_damage(label: object, out: Path) -> None:
    _change(out / "a.svs/heatmap.ome.zarr/zarr.json", ("attributes", "ome", "omero", "channels", 0, "label"), label)
    with pytest.raises(StoreError, match=r"heatmap\.ome\.zarr: damaged metadata"):
        _ = open_result(out)[0].channels


def test_arrays_without_their_metadata_are_told_in_a_line(out: Path) -> None:
    (out / "a.svs/heatmap.ome.zarr/0/zarr.json").write_text("{}")
    with pytest.raises(
        WsiGradcamError, match=r"(has no array 0|/0: damaged metadata .*); expected results of wsi_gradcam"
    ):
        open_result(out)[0].read(0, 0, Region(0, 0, 4, 4))


def test_a_damaged_shard_is_told_in_a_line(out: Path) -> None:
    path = out / "a.svs/heatmap.ome.zarr/0/zarr.json"
    _change(path, ("codecs", 0, "configuration", "index_codecs"), [{"name": "crc32c"}])
    with pytest.raises(WsiGradcamError, match=r"heatmap\.ome\.zarr"):
        open_result(out)[0].read(0, 0, Region(0, 0, 4, 4))


def _change(path: Path, keys: tuple[str | int, ...], value: object) -> None:
    document = json.loads(path.read_text())
    inner = document
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(document))
