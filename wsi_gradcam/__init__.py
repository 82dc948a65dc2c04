"""Explain what neural networks see on whole slides, as OME-Zarr pyramids aligned with the slide.

Importing the package is fast: torch, dask and the readers are loaded by the first call that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from wsi_gradcam.api import encode, explain, validate
    from wsi_gradcam.audit.images import audit_bags, audit_images
    from wsi_gradcam.audit.running import audit_run
    from wsi_gradcam.card import write_card
    from wsi_gradcam.cli.terminal import progress
    from wsi_gradcam.evidence.running import evidence_run
    from wsi_gradcam.gradcam import GradCAM
    from wsi_gradcam.models.load import load_model, model_of
    from wsi_gradcam.models.spec import ModelSpec
    from wsi_gradcam.results.run import open_result
    from wsi_gradcam.run.settings import Settings
    from wsi_gradcam.slides import open_slide

__all__ = [
    "GradCAM",
    "ModelSpec",
    "Settings",
    "__version__",
    "audit_bags",
    "audit_images",
    "audit_run",
    "encode",
    "evidence_run",
    "explain",
    "load_model",
    "model_of",
    "open_result",
    "open_slide",
    "progress",
    "validate",
    "write_card",
]

_HOME = {
    "GradCAM": "wsi_gradcam.gradcam",
    "ModelSpec": "wsi_gradcam.models.spec",
    "Settings": "wsi_gradcam.run.settings",
    "audit_bags": "wsi_gradcam.audit.images",
    "audit_images": "wsi_gradcam.audit.images",
    "audit_run": "wsi_gradcam.audit.running",
    "encode": "wsi_gradcam.api",
    "evidence_run": "wsi_gradcam.evidence.running",
    "explain": "wsi_gradcam.api",
    "load_model": "wsi_gradcam.models.load",
    "model_of": "wsi_gradcam.models.load",
    "open_result": "wsi_gradcam.results.run",
    "open_slide": "wsi_gradcam.slides",
    "progress": "wsi_gradcam.cli.terminal",
    "validate": "wsi_gradcam.api",
    "write_card": "wsi_gradcam.card",
}


def __dir__() -> list[str]:
    """Return the public names, including those that have not been imported yet."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'wsi_gradcam' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
