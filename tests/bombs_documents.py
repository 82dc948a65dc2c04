"""Documents that unpack, repeat or claim more than they should: lists, configurations, models and results."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.bombs import GIB, Random, bomb, side


def sparse(path: Path, head: bytes, size: int, tail: bytes = b"") -> Path:
    """Write a file that is `size` bytes long and takes no room on the disk."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
        file.seek(size)
        file.write(tail)
    return path


def repeated(path: Path, head: str, part: str, count: int, tail: str = "") -> Path:
    """Write a text in which a part is there many times."""
    with path.open("w") as file:
        file.write(head)
        for _ in range(count // 10_000):
            file.write(part * 10_000)
        file.write(part * (count % 10_000) + tail)
    return path


@bomb("list: one line of a gigabyte")
def long_line(folder: Path, rng: Random) -> Path:
    return sparse(folder / "a.csv", b"slide\n", int(rng.uniform(1, 3) * GIB))


@bomb("list: one cell of a hundred megabytes")
def long_cell(folder: Path, rng: Random) -> Path:
    return repeated(folder / "a.csv", 'slide\n"', "a" * 100, side(rng, 6, 6.2), '"\n')


@bomb("list: very many columns")
def many_columns(folder: Path, rng: Random) -> Path:
    return repeated(folder / "a.csv", "slide", ",a", side(rng, 6, 6.5), "\nb.svs\n")


@bomb("list: very many lines")
def many_lines(folder: Path, rng: Random) -> Path:
    return repeated(folder / "a.csv", "slide\n", "s3://b/a.svs\n", side(rng, 6, 6.5))


@bomb("list: Parquet of one value many times")
def repeated_value(folder: Path, rng: Random) -> Path:
    """A dictionary and runs: a billion rows in kilobytes."""
    writer = pq.ParquetWriter(folder / "a.parquet", pa.schema([("slide", pa.string())]))
    table = pa.table({"slide": pa.array(["a" * 1000] * 1_000_000)})
    for _ in range(int(rng.integers(3, 8))):
        writer.write_table(table)
    writer.close()
    return folder / "a.parquet"


@bomb("list: Parquet of a long value")
def long_value(folder: Path, rng: Random) -> Path:
    table = pa.table({"slide": ["a" * side(rng, 8.3, 8.7)]})
    pq.write_table(table, folder / "a.parquet", compression="zstd")
    return folder / "a.parquet"


@bomb("config: aliases of aliases")
def aliases(folder: Path, rng: Random) -> Path:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, int(rng.integers(9, 30)))]
    (folder / "a.yaml").write_text("\n".join(lines))
    return folder / "a.yaml"


@bomb("config: a number of a million digits")
def digits(folder: Path, rng: Random) -> Path:
    return repeated(folder / "a.yaml", "overlap: ", "9", side(rng, 6, 6.5), "\n")


@bomb("config: brackets")
def brackets(folder: Path, rng: Random) -> Path:
    return repeated(folder / "a.yaml", "a: ", "[", side(rng, 5, 6.5))


@bomb("config: of gigabytes")
def long_config(folder: Path, rng: Random) -> Path:
    return sparse(folder / "a.yaml", b"overlap: 0.5\n#", int(rng.uniform(2, 9) * GIB))


@bomb("config: very many keys")
def many_keys(folder: Path, rng: Random) -> Path:
    text = "".join(f"k{i}: 1\n" for i in range(side(rng, 5, 5.3)))
    (folder / "a.yaml").write_text(text[: 4 << 20])
    return folder / "a.yaml"


def model(folder: Path, config: str, weights: bytes = b"\2\0\0\0\0\0\0\0{}") -> Path:
    """Write a folder of a model as on the Hugging Face hub."""
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(weights)
    return folder


TIMM = json.dumps({"architecture": "test_resnet", "num_classes": 2, "pretrained_cfg": {"input_size": [3, 64, 64]}})


@bomb("model: safetensors' header of gigabytes")
def long_header(folder: Path, rng: Random) -> Path:
    size = int(rng.uniform(2, 9) * GIB)
    model(folder, TIMM)
    sparse(folder / "model.safetensors", struct.pack("<Q", size), size + 8)
    return folder


@bomb("model: safetensors' header of many tensors")
def many_tensors(folder: Path, rng: Random) -> Path:
    header = json.dumps(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(side(rng, 5.5, 6))}
    ).encode()
    return model(folder, TIMM, struct.pack("<Q", len(header)) + header)


@bomb("model: a tensor of terabytes")
def vast_tensor(folder: Path, rng: Random) -> Path:
    count = side(rng, 11, 13)
    header = json.dumps({"conv1.weight": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    return model(folder, TIMM, struct.pack("<Q", len(header)) + header)


@bomb("model: weights of gigabytes of zeros")
def long_weights(folder: Path, rng: Random) -> Path:
    count = int(rng.uniform(0.5, 1) * GIB)
    header = json.dumps({"conv1.weight": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    model(folder, TIMM)
    sparse(folder / "model.safetensors", struct.pack("<Q", len(header)) + header, 8 + len(header) + 4 * count)
    return folder


@bomb("model: a configuration of millions of digits")
def long_number(folder: Path, rng: Random) -> Path:
    return model(folder, '{"architecture": "test_resnet", "num_classes": ' + "9" * side(rng, 6, 6.5) + "}")


@bomb("model: a configuration of very many classes")
def many_classes(folder: Path, rng: Random) -> Path:
    return model(folder, json.dumps({"architecture": "test_resnet", "num_classes": side(rng, 8, 12)}))


@bomb("model: a network of very many channels")
def wide_network(folder: Path, rng: Random) -> Path:
    config = json.loads(TIMM) | {"model_args": {"channels": [side(rng, 5, 7)] * 4}}
    return model(folder, json.dumps(config))


@bomb("model: a transformer of very many layers")
def deep_network(folder: Path, rng: Random) -> Path:
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "num_hidden_layers": side(rng, 5, 8)}
    return model(folder, json.dumps(config))


@bomb("model: a transformer of a vast image")
def vast_image(folder: Path, rng: Random) -> Path:
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": side(rng, 5, 8)}
    return model(folder, json.dumps(config))


def results(folder: Path) -> Path:
    """Write results of a small slide."""
    from tests.made_results import Made, make, steps

    return make(folder / "out", {"a.svs": Made((640, 640), steps((40, 40)))})


@bomb("results: a table of one value many times")
def packed_table(folder: Path, rng: Random) -> Path:
    out = results(folder)
    path = next(out.rglob("patches.parquet"))
    schema = pq.read_schema(path)
    columns = [pa.nulls(5_000_000, field.type).fill_null(_zero(field.type)) for field in schema]
    pq.write_table(pa.table(columns, schema=schema), path, compression="zstd")
    return out


def _zero(kind: pa.DataType) -> object:
    value = (
        "a" if pa.types.is_string(kind) or pa.types.is_dictionary(kind) else False if pa.types.is_boolean(kind) else 0
    )
    return pa.scalar(value, kind) if not pa.types.is_dictionary(kind) else pa.scalar(value)


@bomb("results: slides.csv of gigabytes")
def long_slides(folder: Path, rng: Random) -> Path:
    out = results(folder)
    data = (out / "slides.csv").read_bytes()
    sparse(out / "slides.csv", data, int(rng.uniform(1, 9) * GIB))
    return out


@bomb("results: slides.csv of very many slides")
def many_slides(folder: Path, rng: Random) -> Path:
    out = results(folder)
    head, row = (out / "slides.csv").read_text().splitlines()[:2]
    repeated(out / "slides.csv", f"{head}\n", f"{row}\n", side(rng, 5.5, 6))
    return out


@bomb("results: run.yaml of aliases")
def aliased_run(folder: Path, rng: Random) -> Path:
    out = results(folder)
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, int(rng.integers(9, 30))))
    (out / "run.yaml").write_text((out / "run.yaml").read_text() + text)
    return out


@bomb("results: a manifest of gigabytes")
def long_manifest(folder: Path, rng: Random) -> Path:
    out = results(folder)
    path = next(out.rglob("plan.json"))
    sparse(path, path.read_bytes(), int(rng.uniform(2, 9) * GIB))
    return out


@bomb("results: a manifest of brackets")
def deep_manifest(folder: Path, rng: Random) -> Path:
    out = results(folder)
    path = next(out.rglob("plan.json"))
    path.write_text("[" * side(rng, 5, 6.5))
    return out
