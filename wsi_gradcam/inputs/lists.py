"""Lists of slides: tables with the slides' paths and further details, as Parquet or as text from spreadsheets.

Text is UTF-8 or UTF-16, and its cells are separated by commas, semicolons or tabs, as in the header.
"""

from __future__ import annotations

import csv
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import chain
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TextIO

from wsi_gradcam.errors import ConfigError, SlideNotFoundError, one_line
from wsi_gradcam.io.documents import plain_cell
from wsi_gradcam.io.local import alike
from wsi_gradcam.io.urls import is_url, url_name
from wsi_gradcam.slides import check_mpp

if TYPE_CHECKING:
    from pyarrow.parquet import FileMetaData

Mpp = tuple[float, float] | None
Row = dict[str, str]
ENDINGS = CSV, TSV, TXT, PARQUET = (".csv", ".tsv", ".txt", ".parquet")
DELIMITERS = ",;\t"
SEPARATOR = re.compile(r'"?sep=([,;\t])"?\s*')  # a first line that spreadsheets write and read
DECIMAL_COMMA = re.compile(r"[0-9]*,[0-9]+")
MAX_LINE = 1 << 20
MAX_ROWS = 250_000  # an archive of 100,000 slides is a large one; half a KiB each
MAX_BYTES = 256 << 20
MAX_UNPACKED = 128 << 20  # bytes of the columns of a Parquet file that are read
BATCH_ROWS = 4096  # in memory at a time
COLUMNS = ("slide", "mpp", "mpp_y", "mpp_x", "mask", "label", "site", "scanner", "patient")
EXPECTED = "slide, and optionally mpp (or mpp_y and mpp_x), mask, label, site, scanner, patient"


@dataclass(frozen=True, slots=True)
class Details:
    """Details of a slide from a list; empty if the list has none.

    Attributes:
        mpp: (y, x) micrometres per level-0 pixel.
        mask: path of its mask or annotations.
        label, site, scanner, patient: its diagnosis, origin and scanner, and whose it is.
    """

    mpp: Mpp = None
    mask: str = ""
    label: str = ""
    site: str = ""
    scanner: str = ""
    patient: str = ""

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
        ConfigError: not a valid list, or an invalid value; the message names the line.
        SlideNotFoundError: a slide that does not exist.
    """
    rows = _parquet_rows(path) if path.suffix.lower() == PARQUET else _csv_rows(path)
    empty = True
    resolved = cache(os.path.realpath)  # of folders, each of which holds many slides
    once: dict[Mpp, Mpp] = {}  # equal values are one object: there may be 100,000 slides
    for where, row in rows:
        empty = False
        if not (name := row.get("slide", "")):
            raise ConfigError(f"{where}: no slide is given")
        mpp = _mpp(row, where)
        details = Details(
            once.setdefault(mpp, mpp), _mask(path, row, where), *(sys.intern(row.get(key, "")) for key in COLUMNS[-4:])
        )
        if is_url(name):
            yield name, url_name(name), details
            continue
        pure = _expanded(name)
        file = os.path.join(path.parent, pure)  # noqa: PTH118
        if not os.path.exists(file) and (others := alike(path.parent, str(pure))):  # noqa: PTH110 - of 100,000 lines
            file = str(others[0])
        if not os.path.exists(file):  # noqa: PTH110
            raise SlideNotFoundError(f"{where}: {Path(file)} does not exist; paths are relative to the list's folder")
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
        _check_rows(path, _lines_in(path))
        with path.open(encoding=_encoding(path), newline="") as file:
            lines = _lines(file)
            number, header = next(((i, line) for i, line in enumerate(lines, 1) if line.strip()), (0, ""))
            delimiter = ""
            if found := SEPARATOR.fullmatch(header):
                number, delimiter, header = number + 1, found[1], next(lines, "")
            delimiter, names = _columns(path, header, delimiter or DELIMITERS)
            reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
            for cells in reader:
                where = f"{path}, line {number + reader.line_num}"
                row = dict(zip(names, (plain_cell(cell.strip()) for cell in cells), strict=False))
                if any(map(str.strip, cells[len(names) :])):
                    raise ConfigError(
                        f"{where}: {len(cells)} cells, expected {len(names)} as in the first line; quote cells that "
                        f"contain {delimiter!r}"
                    )
                if any(row.values()):
                    yield where, {name: row.get(name, "") for name in _known_columns(path, names)}
    except (UnicodeError, csv.Error, OSError) as error:
        raise _invalid_list(path, error, "CSV in UTF-8 or UTF-16 (spreadsheets call it CSV UTF-8)") from error


def _check_rows(path: Path, rows: int) -> None:
    if rows > MAX_ROWS:
        raise ConfigError(
            f"{path}: the list has {rows:,} lines, expected at most {MAX_ROWS:,}; split it into several lists"
        )


def _lines_in(path: Path) -> int:
    """Return the number of lines of a text, counted only up to the limit.

    Raises:
        ConfigError: it is longer than any list.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ConfigError(f"{path}: {size:,} bytes, expected at most {MAX_BYTES:,}; split it into several lists")
    found = 0
    with path.open("rb") as file:
        while found <= MAX_ROWS and (part := file.read(MAX_LINE)):
            found += part.count(b"\n")
    return found


def _encoding(path: Path) -> str:
    """Return the encoding of a text by its first bytes: spreadsheets write UTF-16 too."""
    with path.open("rb") as file:
        head = file.read(2)
    if head in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    return "utf-16-le" if head[1:] == b"\0" else "utf-16-be" if head[:1] == b"\0" else "utf-8-sig"


def _lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise csv.Error(f"a line of more than {MAX_LINE:,} characters")
        yield line


def _columns(path: Path, header: str, delimiters: str) -> tuple[str, list[str]]:
    """Return the separator of the cells, and the names of the columns.

    Raises:
        ConfigError: no column is called "slide", or more than one character may separate the cells.
    """
    found = {}
    for delimiter in delimiters:
        cells = next(csv.reader([header], delimiter=delimiter, skipinitialspace=True), [])
        names = [cell.strip() for cell in cells]
        if "slide" in names:
            found[delimiter] = names
    different = {tuple(names) for names in found.values()}
    if not found:
        _known_columns(path, (), " in its first line")
    delimiter, names = next(iter(found.items()))
    inner = [name for name in names if set(COLUMNS) & {part.strip() for part in re.split(f"[{DELIMITERS}]", name)[1:]}]
    if len(different) > 1 or inner:
        raise ConfigError(
            f"{path}: its first line {header.strip()[:80]!r} mixes separators; expected commas, semicolons or tabs "
            "throughout"
        )
    if twice := [name for name in COLUMNS if names.count(name) > 1]:
        raise ConfigError(f"{path}: has two columns {twice[0]!r}; remove one")
    return delimiter, names


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield position and known cells of each row."""
    import pyarrow as pa  # not above: most runs have no such list
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as stream:
            file = pq.ParquetFile(stream)
            known = _known_columns(path, file.schema_arrow.names)
            _check_rows(path, file.metadata.num_rows)
            if (size := _unpacked_bytes(file.metadata, known)) > MAX_UNPACKED:
                raise ConfigError(
                    f"{path}: {size:,} bytes of text, expected at most {MAX_UNPACKED:,}; it is not a list of slides"
                )
            rows = chain.from_iterable(
                batch.to_pylist() for batch in file.iter_batches(BATCH_ROWS, columns=known, use_threads=False)
            )
            for number, row in enumerate(rows, 1):
                yield f"{path}, row {number}", {key: _text(value) for key, value in row.items()}
    except (pa.ArrowException, OSError) as error:
        raise _invalid_list(path, error, "a Parquet file") from error


def _unpacked_bytes(about: FileMetaData, names: Sequence[str]) -> int:
    """Return the bytes of the columns of these names, unpacked."""
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema in names)


def _invalid_list(path: Path, error: Exception, expected: str) -> ConfigError:
    return ConfigError(f"{path}: not a list of slides ({one_line(error)}); expected {expected}")


def _known_columns(path: Path, names: Sequence[str], where: str = "") -> list[str]:
    """Return the columns of a list that are used here."""
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
        raise ConfigError(f"{where}: mask {file} is not a file; paths are relative to the list's folder")
    return file


def _mpp(row: Row, where: str) -> Mpp:
    both = row.get("mpp", "")
    y, x = (row.get(f"mpp_{axis}") or both for axis in "yx")
    if not y and not x:
        return None
    values = []
    for text in (y, x):
        try:
            value = float(text.replace(",", ".") if DECIMAL_COMMA.fullmatch(text) else text)
        except ValueError as error:
            raise ConfigError(f"{where}: mpp {text!r} is not a number; fill in both mpp_y and mpp_x, or mpp") from error
        if problem := check_mpp(value, "mpp"):
            raise ConfigError(f"{where}: {problem}")
        values.append(value)
    return values[0], values[1]
