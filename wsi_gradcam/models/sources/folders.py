"""What is read from folders of models: mappings in JSON, class names, checksums."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from wsi_gradcam.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from wsi_gradcam.models.spec import ModelSpec


def read_json(path: Path, source: str) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        ModelError: it does not.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{source}: {path} cannot be read: {error.strerror}; the folder needs it") from error
    except ValueError as error:  # JSON, unicode
        raise ModelError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected a mapping of keys to values")
    return values


def distinct(names: Iterable[object]) -> tuple[str, ...]:
    """Class names that differ: ImageNet has two called `crane`. Repeated ones get their index.

    >>> distinct(["crane", "mouse", "crane"])
    ('crane (0)', 'mouse', 'crane (2)')
    """
    texts = [str(name) for name in names]
    counts = Counter(texts)
    return tuple(text if counts[text] == 1 else f"{text} ({i})" for i, text in enumerate(texts))


def check_sha256(path: Path, spec: ModelSpec) -> None:
    """Compare a file's checksum with the specification's, if it has one.

    Raises:
        ModelError: they differ.
    """
    if spec.sha256 is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != spec.sha256.lower():
        raise ModelError(f"{spec.name}: {path} has sha256 {found}, expected {spec.sha256}; fetch the right file")
