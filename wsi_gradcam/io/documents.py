"""Untrusted YAML, JSON and ZIP, read within limits on size, depth and number; and CSV cells.

YAML goes through the safe loader, in C if that is installed. With aliases, a kilobyte can stand for gigabytes, so they
are refused, and so are merge keys; a `run.yaml` of an older version may have some, within limits on what they stand
for.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Hashable
from io import SEEK_END
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from wsi_gradcam.errors import DocumentError, one_line

MAX_BYTES = 4 << 20  # a model of 21,000 classes takes one MB in run.yaml
MAX_DEPTH = 50
MAX_DIGITS = 40
MAX_TEXT = MAX_BYTES  # characters that all aliases of a document stand for
MERGE = "tag:yaml.org,2002:merge"
# The errors that constructors raise for values such as the date 2026-99-99 or `!!bool 7`.
_WRONG_VALUES = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader, with unique keys, no merge keys, and no number that takes long to convert."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        seen: set[Hashable] = set()
        for key, _ in node.value:
            if key.tag == MERGE:
                raise DocumentError(
                    f"line {key.start_mark.line + 1}: merge keys (<<) are not supported; write the values out"
                )
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise DocumentError(f"line {key.start_mark.line + 1}: a key occurs twice; remove one")
                seen.add((key.tag, key.value))
        super().flatten_mapping(node)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(super().construct_yaml_int(_short(node)))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return float(super().construct_yaml_float(_short(node)))


for _tag, _constructor in (("int", _Loader.construct_yaml_int), ("float", _Loader.construct_yaml_float)):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _constructor)


class _Dumper(yaml.SafeDumper):
    """The safe dumper, without aliases for values that occur twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _short(node: yaml.ScalarNode) -> yaml.ScalarNode:
    if len(node.value) > MAX_DIGITS:
        raise DocumentError(f"line {node.start_mark.line + 1}: a number of {len(node.value)} characters")
    return node


def read_yaml(data: bytes, aliases: bool = False) -> Any:
    """Return the value of a YAML document, in a time that is linear in its size.

    Args:
        aliases: accept anchors and aliases, as long as what they stand for is no larger than a document may be.

    Raises:
        DocumentError: it is not YAML, is too large or too deep, or contains something that is not supported.
    """
    if len(data) > MAX_BYTES:
        raise DocumentError(f"larger than {MAX_BYTES >> 20} MiB")
    try:
        text = data.decode()
        _check_events(text, aliases)
        return yaml.load(text, _Loader)
    except DocumentError:
        raise
    except _WRONG_VALUES as error:
        raise DocumentError(one_line(error)) from error


def _check_events(text: str, aliases: bool) -> None:
    """Refuse aliases and excessive depth, before anything is built from the document.

    An alias counts for as much text as is below its anchor, including aliases there.
    """
    size = copied = 0
    started: list[tuple[str | None, int]] = []  # the anchors of the open nodes, and how much text came before them
    sizes: dict[str | None, int] = {}
    for event in yaml.parse(text, _Loader):
        anchor = getattr(event, "anchor", None)
        if anchor is not None and not aliases:
            raise _refused(event, "anchors and aliases are not supported; write the values out")
        if isinstance(event, yaml.AliasEvent):
            copy = sizes.get(anchor, MAX_TEXT + 1)  # no size yet: it contains itself
            size, copied = size + copy, copied + copy
            if copied > MAX_TEXT:
                raise _refused(event, "its aliases expand to too much; write the values out")
        elif isinstance(event, yaml.ScalarEvent):
            event.value.encode()  # half of a surrogate pair cannot be written anywhere
            size += len(event.value) + 1
            sizes[anchor] = len(event.value) + 1
        elif isinstance(event, yaml.CollectionStartEvent):
            started.append((anchor, size))
            size += 1
            if len(started) > MAX_DEPTH:
                raise _refused(event, f"nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = started.pop()
            sizes[anchor] = size - before


def _refused(event: yaml.Event, why: str) -> DocumentError:
    line = "" if event.start_mark is None else f"line {event.start_mark.line + 1}: "
    return DocumentError(line + why)


def to_yaml(values: Any) -> bytes:
    """Return the YAML of plain values, keys in their order, without aliases."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True).encode()


def read_json(data: bytes | str) -> Any:
    """Return the value of a JSON document.

    Raises:
        DocumentError: it is not JSON, is too deep, or has a number with too many digits.
    """
    try:
        value = json.loads(data, parse_int=_integer)
    except DocumentError:
        raise
    except RecursionError as error:
        raise DocumentError(f"nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:  # UTF-8 too
        raise DocumentError(" ".join(str(error).split())) from error
    if _brackets(data) > MAX_DEPTH:
        _check_depth(value)
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise DocumentError(f"a number of {len(digits)} digits")
    return int(digits)


def _brackets(data: bytes | str) -> int:
    return data.count(b"[") + data.count(b"{") if isinstance(data, bytes) else data.count("[") + data.count("{")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for item in level
            if isinstance(item, list | dict)
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, list | dict)
        ]
        if not level:
            return
    raise DocumentError(f"nested deeper than {MAX_DEPTH} levels")


# What spreadsheets take for a formula, which could start programs or send away the content of other cells.
FORMULA = re.compile(r"'*[=+\-@\t\r]")
NUMBER = re.compile(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", re.ASCII)


def safe_cell(value: Any) -> Any:
    """Return a value for a cell of a CSV file; text that would be a formula gets a leading apostrophe.

    >>> safe_cell("=1+1"), safe_cell("-0.5"), safe_cell("a=b")
    ("'=1+1", '-0.5', 'a=b')
    """
    text = isinstance(value, str) and FORMULA.match(value) and not NUMBER.fullmatch(value)
    return f"'{value}" if text else value


def plain_cell(text: str) -> str:
    """Return the value from which `safe_cell` made a cell.

    >>> plain_cell("'=1+1"), plain_cell("'a'"), plain_cell(safe_cell("'=x"))
    ('=1+1', "'a'", "'=x")
    """
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text


MAX_DIRECTORY = 8 << 20  # bytes of a ZIP file's directory: that of 10,000 tensors has one MiB
_END, _END_64, _LOCATOR = struct.Struct("<4s8xI6x"), struct.Struct("<4s36xQ8x"), struct.Struct("<4s4xQ4x")
_MAX_COMMENT = 1 << 16


class LongZipError(zipfile.BadZipFile):
    """A ZIP file with more members than files of ours have."""


def open_zip(file: Path | BinaryIO) -> zipfile.ZipFile:
    """Return an open ZIP file. Its directory is read as a whole, and takes a hundred times its size in memory.

    Raises:
        BadZipFile: it is not a ZIP file, or has too many members (`LongZipError`).
        OSError: it cannot be read.
    """
    if isinstance(file, Path):
        with file.open("rb") as stream:
            size = _directory_bytes(stream)
    else:
        size = _directory_bytes(file)
    if size > MAX_DIRECTORY:
        raise LongZipError(f"its directory has {size:,} bytes, expected at most {MAX_DIRECTORY:,}")
    return zipfile.ZipFile(file)


def _directory_bytes(file: BinaryIO) -> int:
    """Return the length of a ZIP file's directory, as stated in any of the places that may state it."""
    length = file.seek(0, SEEK_END)
    begin = file.seek(max(0, length - _MAX_COMMENT - 2 * _END_64.size))
    tail = file.read()
    found = 0
    for match in re.finditer(rb"PK\x05\x06", tail):
        at = match.start()
        if at + _END.size > len(tail):
            continue
        found = max(found, _END.unpack_from(tail, at)[1] % 0xFFFFFFFF)
        if at >= _LOCATOR.size and tail[at - _LOCATOR.size :].startswith(b"PK\6\7"):
            place = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)[1]
            for record in (begin + at - _LOCATOR.size - _END_64.size, place):
                file.seek(max(0, min(record, length)))
                data = file.read(_END_64.size)
                if len(data) == _END_64.size and data.startswith(b"PK\6\6"):
                    found = max(found, _END_64.unpack(data)[1])
    return found
