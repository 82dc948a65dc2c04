"""Who wants to know how a run goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.run.plan import RunPlan
    from wsi_gradcam.run.types import Performed, SlideRecord, Task


class Listener:
    """Is told how a run goes; the default does nothing."""

    def begun(self, run: RunPlan, slides: Sequence[SlideEntry], dashboard: str) -> None:
        """The model is known and the work starts."""

    def task_done(self, task: Task, performed: Performed) -> None:
        """A piece of work is done."""

    def task_failed(self, task: Task, performed: Performed) -> None:
        """An attempt at a piece of work has failed; where it is not made again, its slide fails."""

    def slide_done(self, record: SlideRecord) -> None:
        """A slide is finished or has failed."""

    def remarked(self, text: str) -> None:
        """Something is worth a line. May come from another thread, and before the work starts."""
