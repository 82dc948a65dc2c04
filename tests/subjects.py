"""The planted networks as subjects of an audit's measures, for tests of single measures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.planted import as_model
from wsi_gradcam.audit.measures.subject import Subject

if TYPE_CHECKING:
    from torch import nn


def subject_of(
    network: nn.Module, *, methods: tuple[str, ...] = ("gradcam",), layer: str | None = "features"
) -> Subject:
    """Return the network under audit."""
    return Subject.of(as_model(network, layer), methods, batch_size=64)
