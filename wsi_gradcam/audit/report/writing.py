"""Writing the pages of an audit: slide by slide, so that pictures of one slide alone are in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from wsi_gradcam.audit.folder import read_arrays
from wsi_gradcam.audit.metrics import metrics_of
from wsi_gradcam.audit.report.page import archive_page, slide_page
from wsi_gradcam.audit.report.pictures import SHOWN, examples_of, scale_of, smaller
from wsi_gradcam.results.run_files import RunFolder

if TYPE_CHECKING:
    from wsi_gradcam.audit.folder import AuditFolder
    from wsi_gradcam.audit.measurements import Measurements
    from wsi_gradcam.audit.metrics import ArchiveFacts
    from wsi_gradcam.audit.plan import AuditPlan
    from wsi_gradcam.audit.report.pictures import Example, Picture
    from wsi_gradcam.audit.schema import Metrics

OVERVIEW_PX = 1100


def write_reports(
    folder: AuditFolder, plan: AuditPlan, data: Measurements, metrics: Metrics, archive: ArchiveFacts
) -> None:
    """Write a page for each slide of the sample, and that of the archive."""
    method, digest = plan.run.settings.method[0], plan.audit_digest()
    slides = list(dict.fromkeys(data.slides.tolist()))
    factor = next(shown.factor for shown in plan.run.maps if shown.method == method)
    scale = scale_of(data.patches.maps[method]) * factor
    each = max(1, -(-SHOWN // len(slides)))
    shown: list[Example] = []
    alone = replace(archive, not_audited=())
    for slide in slides:
        own = metrics_of(data.of_slide(slide), plan, alone, slide)
        examples = examples_of(
            read_arrays(folder.batch(slide, digest, 0)), slide, method, factor, plan.run.facts.classes
        )
        if len(shown) < SHOWN:
            shown += examples[:each]
        page = slide_page(own, examples, scale, _overview(plan, slide))
        folder.slide_report(slide).write(page)
    folder.report.write(archive_page(metrics, slides, shown[:SHOWN], scale))


def _overview(plan: AuditPlan, slide: str) -> Picture | None:
    """Return the slide beside its heatmaps, as the run has drawn it; None where it has not."""
    try:
        data = RunFolder(plan.run.out).slide(slide).overview.read()
    except FileNotFoundError:
        return None
    return smaller(data, f"{slide}: the slide and its heatmaps", OVERVIEW_PX)
