"""What two folders of results differ in, value by value; for tests/continuity.py."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zarr
from numpy.typing import NDArray
from PIL import Image

ADDED = "only now"  # how a key differs that the older checkout did not write

# In which a run tells of itself: may change whenever it runs, and is not compared; nor is a list of digests.
OF_ITSELF = re.compile(r"(.*/)?(claim\.json|\.lock|status\.json|run\.html|log/.*)|audit/files\.json")
# Written again by every run and every audit; what stands in them stays.
REWRITTEN = re.compile(r"run\.yaml|slides\.csv|audit/metrics\.json|audit/(.*/)?report\.html")


@dataclass(frozen=True)
class Allowed:
    """A difference that may be: patterns of a file's name and of a key, and why; `added`: only by being there."""

    file: str
    key: str
    why: str
    added: bool = False

    def covers(self, name: str, key: str, words: str) -> bool:
        fits = re.fullmatch(self.file, name) and re.fullmatch(self.key, key)
        return bool(fits) and (not self.added or words == ADDED)


CONTINUED = (
    Allowed(r"run\.yaml", r"versions\..*", "versions"),
    Allowed(r"run\.yaml", r"model\.folder", "path of the checkout"),
    Allowed(r"run\.yaml", r"settings\..*", "new setting", added=True),
    Allowed(r"audit/metrics\.json", r"run\.versions\..*", "versions"),
    Allowed(r"audit/(.*/)?report\.html", r".*", "pages may be drawn otherwise"),
    Allowed(r"run\.yaml", r"sha256_of_the_rest", "new digest", added=True),
    Allowed(r"slides\.csv", r".*: row_digest", "new digest", added=True),
    Allowed(r"audit/metrics\.json", r"(estimates|comparisons|curves|verdicts)\.\d+\..*", "new field", added=True),
)
ALLOWED = (
    *CONTINUED,
    Allowed(r"slides\.csv", r".*: seconds", "seconds"),
    Allowed(r"slides\.csv", r".*: row_digest", "seconds"),
    Allowed(r".*/manifest/plan\.json", r".*", "new field", added=True),
    Allowed(r".*/manifest/done\.json", r"files\.overview\.png", "each probability is shown once"),
    Allowed(r".*/overview\.png", r"pixels", "each probability is shown once"),
    Allowed(r".*", r"(\d+\.)?sha256_of_the_rest", "new digest", added=True),
    Allowed(r".*/manifest/done\.json", r"slide|made_with|(arrays|files)\..*", "new digest", added=True),
    Allowed(r"audit/metrics\.json", r"run\.out", "path of OUT"),
    Allowed(r".*/cams\.zarr/.*/zarr\.json", r"dimension_names.*", "axes have names", added=True),
    Allowed(r".*/patches\.parquet", r"metadata wsi_gradcam.*", "new field", added=True),
    Allowed(r".*/manifest/done\.json", r"files\.patches\.parquet", "digest of a table with new fields"),
)

# Rows of the table: the first whose pattern fits a name.
KINDS = {
    "heatmap.ome.zarr, arrays": r".*/heatmap\.ome\.zarr(/.*)?/values",
    "cams.zarr, arrays": r".*/cams\.zarr(/.*)?/values",
    "spread.ome.zarr, arrays": r"audit/.*/spread\.ome\.zarr(/.*)?/values",
    "zarr.json": r".*\.zarr/(.*/)?zarr\.json",
    "patches.parquet": r".*/patches\.parquet",
    "slides.csv": r"slides\.csv",
    "audit, numbers (.npz)": r"audit/.*\.npz",
    "audit/metrics.json": r"audit/metrics\.json",
    "audit/plan.json, spread.json": r"audit/(.*/)?(plan|spread)\.json",
    "audit, pages": r"audit/(.*/)?report\.html",
    "manifests": r".*/manifest/.*\.json",
    "run.yaml, slides.jsonl": r"run\.yaml|slides\.jsonl",
    "pictures": r".*\.png",
    "other files": r".*",
}


# What results hold

Leaves = dict[str, Any]  # arrays and plain values by a key


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Each plain value inside of lists and dictionaries, with the way to it.

    >>> dict(flat({"a": [1, {"b": None}], "c": []}))
    {'a.0': 1, 'a.1.b': None, 'c': []}
    """
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inner or not value:
        yield key, value
    else:
        for name, part in inner:
            yield from flat(part, f"{key}.{name}" if key else str(name))


def of_table(path: Path) -> Leaves:
    """Columns of a Parquet file, where they hold nothing, their types, and what stands in its schema."""
    table = pq.read_table(path)
    found: Leaves = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        found[f"{name}: type"] = str(column.type)
        found[f"{name}: empty"] = column.is_null().to_numpy()
        found[name] = np.array([value or "" for value in column.to_pylist()]) if text else column.to_numpy()
    for key, value in (table.schema.metadata or {}).items():
        found |= flat(json.loads(value), f"metadata {key.decode()}")
    return found


def of_csv(path: Path) -> Leaves:
    """Cells by row and column."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {f"{row['id']}: {column}": cell for row in rows for column, cell in row.items()}


def of_picture(path: Path) -> Leaves:
    with Image.open(path) as picture:
        return {"mode": picture.mode, "info": repr(sorted(picture.info.items())), "pixels": np.asarray(picture)}


def of_numbers(path: Path) -> Leaves:
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def of_lines(path: Path) -> Leaves:
    return dict(flat([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]))


READERS: dict[str, Callable[[Path], Leaves]] = {
    ".json": lambda path: dict(flat(json.loads(path.read_bytes()))),
    ".yaml": lambda path: dict(flat(yaml.safe_load(path.read_bytes()))),
    ".jsonl": of_lines,
    ".csv": of_csv,
    ".parquet": of_table,
    ".npz": of_numbers,
    ".png": of_picture,
}
VALUES = "values"  # stands for the chunks of an array


def contents(out: Path) -> dict[str, Path]:
    """Everything in OUT that is compared, by name: files, and the folders of arrays instead of their chunks."""
    found = {}
    for path in out.rglob("*"):
        name = path.relative_to(out).as_posix()
        inside = re.search(r"\.zarr/", name)
        if not path.is_file() or OF_ITSELF.fullmatch(name) or (inside and path.name != "zarr.json"):
            continue
        found[name] = path
        if inside and json.loads(path.read_bytes())["node_type"] == "array":
            found[f"{name.removesuffix('zarr.json')}{VALUES}"] = path.parent
    return found


def leaves(path: Path) -> Leaves:
    """What a file or an array holds."""
    if path.is_dir():
        return {VALUES: np.asarray(zarr.open_array(path, mode="r")[...])}
    reader = READERS.get(path.suffix)
    return {"bytes": hashlib.sha256(path.read_bytes()).hexdigest()} if reader is None else reader(path)


# Comparing them


@dataclass
class Comparison:
    """What was compared: files and values by kind, what differs, and what differs and may."""

    files: Counter[str] = field(default_factory=Counter)
    values: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[str, str]] = field(default_factory=list)  # kind, and what
    allowed: list[tuple[str, str]] = field(default_factory=list)

    def table(self) -> str:
        """In Markdown, a row a kind."""
        wrong, allowed = (Counter(kind for kind, _ in found) for found in (self.wrong, self.allowed))
        rows = [
            f"| {kind} | {self.files[kind]} | {self.values[kind]:,} | {allowed[kind]} | {wrong[kind]} |"
            for kind in KINDS
            if self.files[kind]
        ]
        return "\n".join(["| what | files | values | differ and may | differ |", "|---|---|---|---|---|", *rows])


def compare(old: Path, new: Path, allowed: Sequence[Allowed] = ALLOWED) -> Comparison:
    """All results in two folders."""
    found, there, here = Comparison(), contents(old), contents(new)
    for name in sorted({*there, *here}):
        kind = next(kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, name))
        found.files[kind] += 1
        if name not in there or name not in here:
            found.wrong.append((kind, f"{name}: only in the {'old' if name in there else 'new'} results"))
            continue
        before, now = leaves(there[name]), leaves(here[name])
        for key in sorted({*before, *now}):
            value = before.get(key)
            found.values[kind] += value.size if isinstance(value, np.ndarray) else 1
            if words := difference(before, now, key):
                why = next((rule.why for rule in allowed if rule.covers(name, key, words)), "")
                line = f"{name}: {key}: {words}"
                (found.allowed if why else found.wrong).append((kind, f"{line} ({why})" if why else line))
    return found


def difference(before: Leaves, now: Leaves, key: str) -> str:
    """In which way two values differ; "" where they do not."""
    if key not in before or key not in now:
        return "only there" if key in before else ADDED
    old, new = before[key], now[key]
    if not (isinstance(old, np.ndarray) and isinstance(new, np.ndarray)):
        return "" if repr(old) == repr(new) else f"{short(old)} there, {short(new)} now"
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        if old.dtype.kind == new.dtype.kind == "U" and old.shape == new.shape and (old == new).all():
            return ""
        return f"{old.dtype} {list(old.shape)} there, {new.dtype} {list(new.shape)} now"
    other = differing(old, new)
    if not other.any():
        return ""
    first = tuple(int(i) for i in np.argwhere(other)[0])
    told = f"{int(other.sum())} of {old.size} values, first at {list(first)}: {old[first]} there, {new[first]} now"
    if old.dtype.kind not in "fiu":
        return told
    return f"{told}, {np.nanmax(np.abs(old[other].astype(float) - new[other].astype(float))):.3g} at most"


def differing(old: NDArray[Any], new: NDArray[Any]) -> NDArray[np.bool_]:
    """Where the bits of two arrays differ, but for those of NaN."""
    if old.dtype.kind != "f":
        return np.asarray(old != new)
    bits = np.dtype(f"u{old.itemsize}")
    other = old.copy().view(bits) != new.copy().view(bits)
    return np.asarray(other & ~(np.isnan(old) & np.isnan(new)))


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# Changing single values, to see that each is found


def by_a_bit(values: NDArray[Any]) -> tuple[int, ...]:
    """Change the first finite number to the next that there is; returns its index."""
    index = tuple(int(i) for i in np.argwhere(np.isfinite(values))[0])
    values[index] = np.nextafter(values[index], np.inf, dtype=values.dtype)
    return index


def tamper_array(folder: Path) -> None:
    array = zarr.open_array(folder, mode="r+")
    values = np.array(array[...])
    index = by_a_bit(values)
    array[index] = values[index]


def tamper_numbers(path: Path) -> None:
    numbers = of_numbers(path)
    by_a_bit(numbers["base/logits"])
    np.savez_compressed(path, **numbers)


def tamper_table(path: Path) -> None:
    table = pq.read_table(path)
    at = table.column_names.index("logit_tumour")
    values = table.column(at).to_numpy().copy()
    by_a_bit(values)
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(values)), path)


def tamper_json(path: Path) -> None:
    """Add 1 to the first number that is not a part of a version."""
    values = json.loads(path.read_bytes())
    todo = [values]
    while todo:
        inner = todo.pop(0)
        for key, value in inner.items() if isinstance(inner, dict) else enumerate(inner):
            if type(value) in (int, float):
                inner[key] = value + 1
                path.write_text(json.dumps(values), encoding="utf-8")
                return
            if isinstance(value, dict | list):
                todo.append(value)
    raise ValueError(f"{path} holds no number")


def tamper_csv(path: Path) -> None:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[-1]["patches"] += "0"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def tamper_picture(path: Path) -> None:
    with Image.open(path) as picture:
        pixels = np.array(picture)
    pixels.flat[pixels.size // 2] ^= 1
    Image.fromarray(pixels).save(path)


TAMPERS: tuple[tuple[str, Callable[[Path], Any]], ...] = (
    (r".*/heatmap\.ome\.zarr/0/values", tamper_array),
    (r".*/cams\.zarr/cam/values", tamper_array),
    (r"audit/.*/spread\.ome\.zarr/0/values", tamper_array),
    (r".*/heatmap\.ome\.zarr/zarr\.json", tamper_json),
    (r".*/patches\.parquet", tamper_table),
    (r"slides\.csv", tamper_csv),
    (r"audit/.*\.npz", tamper_numbers),
    (r"audit/metrics\.json", tamper_json),
    (r".*/manifest/done\.json", tamper_json),
    (r".*/overview\.png", tamper_picture),
    (r".*/tissue\.png", Path.unlink),
)
