"""Reading what `explain` wrote: `open_result` returns a `Result`, which holds a `SlideResult` a slide."""

from __future__ import annotations

from wsi_gradcam.result.channels import ChannelInfo
from wsi_gradcam.result.run import Result, locate, open_result
from wsi_gradcam.result.slide import SlideResult

__all__ = ["ChannelInfo", "Result", "SlideResult", "locate", "open_result"]
