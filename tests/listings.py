"""Folders of files that nobody reads, and the slides found in them."""

from __future__ import annotations

from pathlib import Path

from wsi_gradcam.inputs.find import find_slides


def touch(root: Path, *names: str) -> None:
    """Files of these names below `root`, each with its name in it."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def ids(*paths: Path | str) -> list[str]:
    """Ids of the slides found."""
    return [slide.id for slide in find_slides(paths)]
