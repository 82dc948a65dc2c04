"""Names of everything below OUT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsi_gradcam.io.paths import StoragePath


@dataclass(frozen=True)
class SlideFolder:
    """The folder of one slide's results."""

    place: StoragePath

    @property
    def heatmap(self) -> StoragePath:
        """OME-Zarr image of the heatmap."""
        return self.place / "heatmap.ome.zarr"

    @property
    def cams(self) -> StoragePath:
        """Patch store."""
        return self.place / "cams.zarr"

    @property
    def table(self) -> StoragePath:
        """A row a patch."""
        return self.place / "patches.parquet"

    @property
    def overview(self) -> StoragePath:
        """Picture of slide and overlay."""
        return self.place / "overview.png"

    @property
    def tissue(self) -> StoragePath:
        """Tissue mask over the whole slide."""
        return self.place / "tissue.png"

    @property
    def manifest(self) -> StoragePath:
        """What is done."""
        return self.place / "manifest"


@dataclass(frozen=True)
class RunFolder:
    """OUT."""

    place: StoragePath

    @property
    def run(self) -> StoragePath:
        """The resolved configuration."""
        return self.place / "run.yaml"

    @property
    def slides(self) -> StoragePath:
        """A row a slide."""
        return self.place / "slides.csv"

    @property
    def display(self) -> StoragePath:
        """The run's display windows, made when first asked for."""
        return self.place / "display.json"

    @property
    def record(self) -> StoragePath:
        """The slides with their ids, written before work begins."""
        return self.place / "slides.jsonl"

    def slide(self, slide_id: str) -> SlideFolder:
        """The folder of a slide."""
        return SlideFolder(self.place / slide_id)
