"""Zarr groups at places, made and opened with few requests: in an object store each costs tens of milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import zarr
from zarr.storage import MemoryStore

from wsi_gradcam.io.local import LocalPath

if TYPE_CHECKING:
    from zarr.abc.store import Store
    from zarr.core.buffer import Buffer

    from wsi_gradcam.io.base import StoragePath


def lay_out(place: StoragePath, build: Callable[[Store], None]) -> None:
    """Put what `build` makes in an empty store at a place, instead of what is there.

    It is made in memory first: zarr itself would ask for each array whether there is one already.

    Raises:
        StoreError: the place cannot be written.
    """
    made: dict[str, Buffer] = {}
    build(MemoryStore(made))
    place.remove_tree()
    place.write_many({name: data.to_bytes() for name, data in made.items()})


class OpenGroup:
    """A group of Zarr 3; metadata of its arrays is read once.

    Raises:
        FileNotFoundError: there is none.
    """

    def __init__(self, place: StoragePath, *, read_only: bool = False) -> None:
        if isinstance(place, LocalPath) and not place.path.is_dir():  # zarr would make the folder
            raise FileNotFoundError(f"{place}: does not exist")
        self.group = zarr.open_group(place.zarr_store(read_only), mode="r" if read_only else "r+", zarr_format=3)
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def array(self, name: str) -> zarr.Array[Any]:
        """An array by its path in the group."""
        if name not in self._arrays:
            array = self.group[name]
            assert isinstance(array, zarr.Array)
            self._arrays[name] = array
        return self._arrays[name]
