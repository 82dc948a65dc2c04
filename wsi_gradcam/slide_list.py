"""Lists of slides: CSV files that name slides, and tell what their files do not."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path, PurePath

from wsi_gradcam.errors import ConfigError, SlideNotFoundError, one_line
from wsi_gradcam.slides import check_mpp
from wsi_gradcam.urls import is_url, name_of

Mpp = tuple[float, float] | None
COLUMNS = "slide, and if need be mpp, or mpp_y and mpp_x"


def read_list(path: Path) -> Iterator[tuple[Path | str, str, Mpp]]:
    """File or URL, name and mpp (y, x) of each slide in a CSV list; relative paths start at the list's folder.

    Raises:
        ConfigError: not such a list, or a value that is none; the message names the line.
        SlideNotFoundError: a slide that is not there.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte order mark
            reader = csv.DictReader(file, skipinitialspace=True)
            if "slide" not in (reader.fieldnames or ()):
                raise ConfigError(f"{path}: no column 'slide' in its first line; expected the columns {COLUMNS}")
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: not a list of slides ({one_line(error)}); expected CSV in UTF-8") from error
    if not rows:
        raise ConfigError(f"{path}: no slide in this list")
    for number, row in rows:
        where = f"{path}, line {number}"
        if not (name := (row["slide"] or "").strip()):
            raise ConfigError(f"{where}: no slide named")
        if is_url(name):
            yield name, name_of(name), _mpp(row, where)
            continue
        file_path = path.parent / Path(name).expanduser()
        if not file_path.exists():
            raise SlideNotFoundError(f"{where}: {file_path} does not exist; paths start at the list's own folder")
        inside = not Path(name).is_absolute() and ".." not in PurePath(name).parts
        yield file_path, PurePath(name).as_posix() if inside else file_path.name, _mpp(row, where)


def _mpp(row: dict[str, str | None], where: str) -> Mpp:
    both = (row.get("mpp") or "").strip()
    y, x = ((row.get(f"mpp_{axis}") or "").strip() or both for axis in "yx")
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
