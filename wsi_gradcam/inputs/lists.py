"""Lists of slides: CSV or Parquet files with the slides' paths and further details."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from wsi_gradcam.errors import ConfigError, SlideNotFoundError, one_line
from wsi_gradcam.io.paths import alike
from wsi_gradcam.io.urls import is_url, url_name
from wsi_gradcam.slides import check_mpp

Mpp = tuple[float, float] | None
Row = dict[str, str]
ENDINGS = CSV, PARQUET = (".csv", ".parquet")
BATCH_ROWS = 4096  # in memory at a time
COLUMNS = ("slide", "mpp", "mpp_y", "mpp_x", "mask", "label", "site", "scanner")
EXPECTED = "slide, and if need be mpp, or mpp_y and mpp_x, and mask, label, site, scanner"


@dataclass(frozen=True, slots=True)
class Details:
    """Details of a slide by a list; empty where the list has none.

    Attributes:
        mpp: (y, x) micrometres per level-0 pixel.
        mask: path of its mask or annotations.
        label, site, scanner: its diagnosis, origin and scanner.
    """

    mpp: Mpp = None
    mask: str = ""
    label: str = ""
    site: str = ""
    scanner: str = ""

    def updated(self, later: Details) -> Details:
        """Return these details with later ones, which take precedence."""
        return Details(*(getattr(later, field.name) or getattr(self, field.name) for field in fields(Details)))


NO_DETAILS = Details()


def is_list(path: Path) -> bool:
    """Return True for a file that is a list of slides, by its ending."""
    return path.suffix.lower() in ENDINGS and path.is_file()


def read_list(path: Path) -> Iterator[tuple[str, str, Details]]:
    """Yield path or URL, name and details of each slide in a list; relative paths start at the list's folder.

    All folders in a path are resolved: a link is a slide of its own, `a/../a` is not.

    Raises:
        ConfigError: not such a list, or an invalid value; the message names the line.
        SlideNotFoundError: a slide that does not exist.
    """
    rows = _parquet_rows(path) if path.suffix.lower() == PARQUET else _csv_rows(path)
    empty = True
    resolved = cache(os.path.realpath)  # of folders, each of which holds many slides
    once: dict[Mpp, Mpp] = {}  # equal values are one object: there may be 100,000 slides
    for where, row in rows:
        empty = False
        if not (name := row.get("slide", "")):
            raise ConfigError(f"{where}: no slide named")
        mpp = _mpp(row, where)
        details = Details(
            once.setdefault(mpp, mpp), _mask(path, row, where), *(sys.intern(row.get(key, "")) for key in COLUMNS[-3:])
        )
        if is_url(name):
            yield name, url_name(name), details
            continue
        pure = _expanded(name)
        file = os.path.join(path.parent, pure)  # noqa: PTH118
        if not os.path.exists(file) and (others := alike(path.parent, str(pure))):  # noqa: PTH110 - of 100,000 lines
            file = str(others[0])
        if not os.path.exists(file):  # noqa: PTH110
            raise SlideNotFoundError(f"{where}: {Path(file)} does not exist; paths start at the list's own folder")
        folder, last = os.path.split(file)
        inside = not pure.is_absolute() and ".." not in pure.parts
        yield os.path.join(resolved(folder), last), pure.as_posix() if inside else last, details  # noqa: PTH118
    if empty:
        raise ConfigError(f"{path}: no slide in this list")


def _expanded(name: str) -> PurePath:
    """Return a path in a list, with `~` expanded to a home folder if there is one."""
    return PurePath(os.path.expanduser(name))  # noqa: PTH111 - pathlib's own raises for unknown users


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield position and known cells of each line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte order mark
            reader = csv.DictReader(file, skipinitialspace=True)
            known = _known_columns(path, reader.fieldnames or (), " in its first line")
            for row in reader:
                yield f"{path}, line {reader.line_num}", {key: (row[key] or "").strip() for key in known}
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise _invalid_list(path, error, "CSV in UTF-8") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield position and known cells of each row."""
    import pyarrow as pa  # not above: most runs have no such list
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as stream:
            file = pq.ParquetFile(stream)
            known = _known_columns(path, file.schema_arrow.names)
            rows = chain.from_iterable(
                batch.to_pylist() for batch in file.iter_batches(BATCH_ROWS, columns=known, use_threads=False)
            )
            for number, row in enumerate(rows, 1):
                yield f"{path}, row {number}", {key: _text(value) for key, value in row.items()}
    except (pa.ArrowException, OSError) as error:
        raise _invalid_list(path, error, "a Parquet file") from error


def _invalid_list(path: Path, error: Exception, expected: str) -> ConfigError:
    return ConfigError(f"{path}: not a list of slides ({one_line(error)}); expected {expected}")


def _known_columns(path: Path, names: Sequence[str], where: str = "") -> list[str]:
    """Return those of a list's columns that have a meaning here."""
    if "slide" not in names:
        raise ConfigError(f"{path}: no column 'slide'{where}; expected the columns {EXPECTED}")
    return [name for name in COLUMNS if name in names]


def _text(value: Any) -> str:
    """Return a cell as in CSV; integers without a point, as pandas turns columns with gaps into floats."""
    if value is None or value != value:  # NaN is how some programs write a gap
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)).strip()


def _mask(path: Path, row: Row, where: str) -> str:
    if not (name := row.get("mask", "")):
        return ""
    if is_url(name):
        raise ConfigError(f"{where}: mask {name} is a URL; expected a file on disk")
    file = os.path.abspath(path.parent / _expanded(name))  # noqa: PTH100 - workers may run in another folder
    if not os.path.isfile(file) and (others := alike(path.parent, str(_expanded(name)))):  # noqa: PTH113
        file = str(others[0].absolute())
    if not os.path.isfile(file):  # noqa: PTH113
        raise ConfigError(f"{where}: mask {file} is no file; paths start at the list's own folder")
    return file


def _mpp(row: Row, where: str) -> Mpp:
    both = row.get("mpp", "")
    y, x = (row.get(f"mpp_{axis}") or both for axis in "yx")
    if not y and not x:
        return None
    values = []
    for text in (y, x):
        try:
            value = float(text)
        except ValueError as error:
            raise ConfigError(f"{where}: mpp {text!r} is no number; give both mpp_y and mpp_x, or mpp") from error
        if problem := check_mpp(value, "mpp"):
            raise ConfigError(f"{where}: {problem}")
        values.append(value)
    return values[0], values[1]
