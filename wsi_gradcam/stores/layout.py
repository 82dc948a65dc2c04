"""Names of everything below OUT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SlideFolder:
    """The folder of one slide's results."""

    path: Path

    @property
    def heatmap(self) -> Path:
        """OME-Zarr image of the heatmap."""
        return self.path / "heatmap.ome.zarr"

    @property
    def cams(self) -> Path:
        """Patch store."""
        return self.path / "cams.zarr"

    @property
    def table(self) -> Path:
        """A row a patch."""
        return self.path / "patches.parquet"

    @property
    def overview(self) -> Path:
        """Picture of slide and overlay."""
        return self.path / "overview.png"

    @property
    def tissue(self) -> Path:
        """Tissue mask over the whole slide."""
        return self.path / "tissue.png"

    @property
    def manifest(self) -> Path:
        """What is done."""
        return self.path / "manifest"


@dataclass(frozen=True)
class RunFolder:
    """OUT."""

    path: Path

    @property
    def run(self) -> Path:
        """The resolved configuration."""
        return self.path / "run.yaml"

    @property
    def slides(self) -> Path:
        """A row a slide."""
        return self.path / "slides.csv"

    @property
    def display(self) -> Path:
        """The run's display windows, made when first asked for."""
        return self.path / "display.json"

    def slide(self, slide_id: str) -> SlideFolder:
        """The folder of a slide."""
        return SlideFolder(self.path / slide_id)
