"""Progress: bars on a terminal, plain lines in a log, a bar below the cell of a notebook."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from wsi_gradcam.cam.facts import EXACT
from wsi_gradcam.cli import say
from wsi_gradcam.errors import counted, printable
from wsi_gradcam.pages import render
from wsi_gradcam.run.progress import Progress
from wsi_gradcam.run.types import Part, Performed, Planned, RunListener, Task
from wsi_gradcam.system.processes import format_duration

if TYPE_CHECKING:
    from wsi_gradcam.cam.facts import Choice
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.run.types import SlideRecord, Workload

LINE_EVERY_S = 30.0
DRAW_EVERY_S = 0.2  # in a notebook: each update is a message to the browser
NOTEBOOK_LINES = 6
MAX_WORKERS_LISTED = 8


class Quiet(RunListener):
    """A listener that prints nothing, and records whether the work has begun."""

    began = False

    def run_started(self, workload: Workload, slides: Sequence[SlideEntry], dashboard: str) -> None:
        """Record that the work begins: after an error, there may be finished slides."""
        self.began = True


class Lines(Quiet):
    """Progress as plain lines on standard error, for logs."""

    def __init__(self) -> None:
        self.progress = Progress()
        self.last_line = time.monotonic()

    def run_started(self, workload: Workload, slides: Sequence[SlideEntry], dashboard: str) -> None:
        """Print what will be done."""
        super().run_started(workload, slides, dashboard)
        run = workload.run
        self.progress.begin(len(slides), run.settings.readers, workload.patches)
        labels = ", ".join(target.label for target in run.targets)
        said = f"model {run.facts.name}, layer {run.facts.layer}, targets {labels}"
        self.print_line(f"{counted(len(slides), 'slide')}, {said}")
        self.print_line(_engine_line(run.facts.choice))
        if dashboard:
            self.print_line(f"dashboard {dashboard}")

    def part_began(self, part: Part, slides: int, patches: int | None) -> None:
        """Print which pass begins."""
        self.progress.begin_part(part, slides, patches)
        of = "" if patches is None else f", {patches:,} patch{'' if patches == 1 else 'es'}"
        self.print_line(f"{part}: {counted(slides, 'slide')}{of}")

    def task_done(self, task: Task, performed: Performed) -> None:
        """Count patches, and print the pace from time to time."""
        self.progress.task_done(task, performed)
        if isinstance(performed.result, Planned):
            self.print_line(f"{task.slide.id}: {performed.result.patches} patches, {performed.result.left} to do")
        elif task.stage.needs_model and time.monotonic() - self.last_line > LINE_EVERY_S:
            self.print_line(pace(self.progress, whole=True))

    def task_failed(self, task: Task, performed: Performed) -> None:
        """Print tasks that are tried again; other failures end their slide, and are printed then."""
        self.progress.task_done(task, performed)
        if performed.again:
            self.print_line(f"{task.slide.id}: {task} is being retried: {performed.error}")

    def slide_done(self, record: SlideRecord) -> None:
        """Print how the slide ended."""
        self.progress.slide_done(record)
        if not (record.skipped and record.lasting):  # those that failed before are printed in one line
            end = f"{record.status}, {record.seconds:.1f} s" + (f": {record.error}" if record.error else "")
            self.print_line(f"[{self.progress.slides_done}/{self.progress.slides}] {record.slide.id}: {end}")

    def message(self, text: str) -> None:
        """Print the remark."""
        self.print_line(text)

    def print_line(self, text: str) -> None:
        """Print a line."""
        self.last_line = time.monotonic()
        say(text, error=True)


class Bars(Lines):
    """Progress as bars on a terminal."""

    def __init__(self, bars: RichProgress) -> None:
        super().__init__()
        self._bars = bars
        self._slide_bar = bars.add_task("slides", total=None, rate="")
        self._patch_bar = bars.add_task("patches", total=None, rate="")

    def run_started(self, workload: Workload, slides: Sequence[SlideEntry], dashboard: str) -> None:
        """Set the number of slides."""
        super().run_started(workload, slides, dashboard)
        self._bars.update(self._slide_bar, total=len(slides))

    def part_began(self, part: Part, slides: int, patches: int | None) -> None:
        """Begin the bar of the patches anew, for another pass."""
        super().part_began(part, slides, patches)
        self._bars.reset(self._patch_bar, total=patches, description=f"pass {part.number}/{part.of}")

    def task_done(self, task: Task, performed: Performed) -> None:
        """Advance the patches."""
        super().task_done(task, performed)
        self._show_patches()

    def slide_done(self, record: SlideRecord) -> None:
        """Advance the slides; only failures are worth a line above the bars."""
        if record.error:
            super().slide_done(record)
        else:
            self.progress.slide_done(record)
        self._bars.update(self._slide_bar, completed=self.progress.slides_done)
        self._show_patches()  # no patches are expected any more from a slide that could not be planned

    def _show_patches(self) -> None:
        done, expected = self.progress.passes
        rate = pace(self.progress) if done else ""
        what = "passes" if self.progress.to_encode else "patches"  # each patch is encoded, and then explained
        if (part := self.progress.part) is not None:
            what = f"pass {part.number}/{part.of}"
        self._bars.update(self._patch_bar, total=expected or None, completed=done, rate=rate, description=what)

    def print_line(self, text: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(printable(text), style="dim", highlight=False, markup=False)


class NotebookBar(Lines):
    """Progress as a bar below a notebook's cell, with the last lines under it; it needs no widgets."""

    def __init__(self) -> None:
        super().__init__()
        from IPython.display import HTML, display

        self._html: Any = HTML
        self._texts: list[str] = []
        self._drawn_s = -math.inf
        self._shown: Any = display(HTML(self._page()), display_id=True)

    def task_done(self, task: Task, performed: Performed) -> None:
        """Advance the bar."""
        super().task_done(task, performed)
        self._draw()

    def slide_done(self, record: SlideRecord) -> None:
        """Print how the slide ended."""
        super().slide_done(record)
        self._draw(now=True)

    def print_line(self, text: str) -> None:
        """Show a line under the bar, in place of the oldest."""
        self.last_line = time.monotonic()
        self._texts = [*self._texts, printable(text)][-NOTEBOOK_LINES:]
        self._draw(now=True)

    def _draw(self, now: bool = False) -> None:
        if now or time.monotonic() - self._drawn_s > DRAW_EVERY_S:
            self._drawn_s = time.monotonic()
            self._shown.update(self._html(self._page()))

    def _page(self) -> str:
        done, expected = self.progress.passes
        words = pace(self.progress, whole=True) if done else "starting"
        return render("cli/progress.html", done=done, expected=expected, words=words, lines=self._texts)


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


@contextmanager
def progress(quiet: bool = False) -> Iterator[Quiet]:
    """Return a listener for `explain`, `encode` and `audit_run` that shows progress where it is called.

    That is a bar below the cell of a notebook, bars on a terminal, and plain lines elsewhere; nothing if `quiet`.
    """
    if quiet:
        yield Quiet()
    elif in_notebook():
        yield NotebookBar()
    elif sys.stderr.isatty():
        columns = (
            TextColumn("{task.description:>8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
        )
        with RichProgress(*columns, console=Console(stderr=True)) as bars:
            yield Bars(bars)
    else:
        yield Lines()


def pace(numbers: Progress, whole: bool = False) -> str:
    """Return the speed, how busy the model is, and the time left; a `whole` line also has counts and workers."""
    parts = [f"{numbers.rate():.0f} patches/s"]
    now_s, explaining = numbers.elapsed_s(), ((name, w) for name, w in numbers.workers.items() if w.patches)
    shares = {name: worker.status(now_s, numbers.readers) for name, worker in explaining}
    if shares:
        mean = {
            key: sum(getattr(share, key) for share in shares.values()) / len(shares) for key in ("model", "reading")
        }
        parts.append(f"model busy {mean['model']:.0%}, reading {mean['reading']:.0%}")
    if (left_s := numbers.left_s()) is not None:
        parts.append(f"about {format_duration(left_s)} left")
    if not whole:
        return ", ".join(parts)
    first = f", {numbers.encoded} encoded" if numbers.encoded else ""
    counts = f"{numbers.slides_done}/{numbers.slides} slides, {numbers.patches_done} patches{first}"
    if numbers.part is not None:
        done, expected = numbers.passes
        counts = f"{numbers.part}: {done} of {expected} patches"
    if 1 < len(shares) <= MAX_WORKERS_LISTED:
        each = (f"{name} {share.patches_per_s:.0f}/s" for name, share in sorted(shares.items()))
        parts.append("workers " + ", ".join(each))
    elif len(shares) > MAX_WORKERS_LISTED:
        parts.append(f"{len(shares)} workers")
    return ", ".join([counts, *parts])


def _engine_line(choice: Choice) -> str:
    """Return the engine that runs the model, and the results of those that were tried and not chosen."""
    tried = []
    for trial in choice.trials:
        if (trial.engine, trial.precision) != (choice.engine, choice.precision):
            rate = "" if trial.patches_per_s is None else f"{trial.patches_per_s:.0f}/s"
            tried.append(f"{trial.engine} {trial.precision} {', '.join(filter(None, (rate, trial.remark)))}".rstrip())
    taken = [t.patches_per_s for t in choice.trials if (t.engine, t.precision) == (choice.engine, choice.precision)]
    speed = f" {taken[0]:.0f} patches/s" if taken and taken[0] else ""
    line = f"engine {choice.engine} {choice.precision}{speed}" + (f" (also tried: {'; '.join(tried)})" if tried else "")
    return line + _decode_words(choice)


def _decode_words(choice: Choice) -> str:
    """Return how tiles are decoded, if that was asked for."""
    trial = choice.decode_trial
    if trial is None:
        return "" if choice.decode == EXACT else "; tiles are reduced while being decoded"
    why = trial.remark or f"maps correlate with float32's by {trial.pearson:.4f} at least"
    return f"; decoding {choice.decode} ({why})"
