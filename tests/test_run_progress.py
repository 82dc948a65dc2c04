"""The numbers of a run: counts, rates, shares, what is left."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.results.manifest import SlideOutcome, SlideStatus
from wsi_gradcam.run.progress import BINS, CAUSES, NAMED, SLOWEST, Progress, Throughput
from wsi_gradcam.run.status import FailureCause, RunNumbers
from wsi_gradcam.run.types import Part, Performed, Planned, Processed, SlideRecord, Task
from wsi_gradcam.run.workload import EXPLAIN, PLAN, STITCH
from wsi_gradcam.system.processes import format_duration


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def entry(number: int = 0) -> SlideEntry:
    return SlideEntry(f"{number}.svs", f"/slides/{number}.svs")


def record(
    number: int, status: str = "ok", error: str = "", seconds: float = 1.0, skipped: bool = False
) -> SlideRecord:
    return SlideRecord(entry(number), SlideStatus(status), error, 10, 0, seconds, skipped)


def planned(progress: Progress, number: int, left: int, seconds: float = 0.0) -> None:
    pending = Planned(left, left, [0], [[0]], None)
    progress.task_done(Task(PLAN, entry(number)), Performed(pending, seconds, "host:1"))


def explained(progress: Progress, number: int, patches: int, worker: str = "host:1", **times: Any) -> None:
    seconds = times.pop("seconds", 0.0)
    task = Task(EXPLAIN, entry(number), (0,))
    progress.task_done(task, Performed(Processed(patches, 0, **times), seconds, worker))


@given(
    st.lists(st.tuples(st.floats(0, 500), st.integers(0, 10**6)), max_size=40).map(lambda steps: steps),
)
def test_throughput_keeps_all_patches_in_few_bins(steps: list[tuple[float, int]]) -> None:
    throughput, now = Throughput(), 0.0
    for wait, count in steps:
        now += wait * wait
        throughput.add(now, count)
    assert sum(throughput.patches) == sum(count for _, count in steps) == throughput.since(0)
    assert len(throughput.patches) <= BINS
    assert now < BINS * throughput.width_s
    assert throughput.width_s == 1 or now >= BINS / 2 * throughput.width_s


def test_bins_are_where_the_patches_were() -> None:
    throughput = Throughput()
    for second in range(2 * BINS):
        throughput.add(second + 0.5, second)
    assert throughput.width_s == 2
    assert throughput.patches == [4 * i + 1 for i in range(BINS)]
    assert throughput.since(2 * BINS - 4) == throughput.patches[-1] + throughput.patches[-2]


def test_counts_of_slides_and_patches() -> None:
    progress = Progress(Clock())
    progress.begin(4)
    for number, left in enumerate((30, 10)):
        planned(progress, number, left)
    explained(progress, 0, 12)
    progress.slide_done(record(1))
    progress.slide_done(record(2, "failed", "/slides/2.svs: broken; mend it"))
    told = progress.numbers().to_json()
    assert told["slides"] == {"total": 4, "done": 2, "skipped": 0, "ok": 1, "failed": 1}
    patches = {"done": 12, "planned": 40, "encoded": 0}
    assert told["patches"] == {**patches, "expected": 60}  # another slide of 20; one was never planned
    assert json.loads(json.dumps(told)) == told
    assert RunNumbers.from_json(told) == progress.numbers()


def test_slides_that_were_finished_before_do_not_make_the_rest_look_small() -> None:
    """A continued run: nothing is left of the first two slides, as much as of the third is expected of the others."""
    progress = Progress(Clock())
    progress.begin(6)
    for number in (0, 1):
        done = SlideOutcome(SlideStatus.OK, 100, 0, "")
        progress.task_done(Task(PLAN, entry(number)), Performed(Planned(100, 0, [], [], done)))
        progress.slide_done(record(number, skipped=True))
    assert progress.patches_expected == 400
    progress.task_done(Task(PLAN, entry(2)), Performed(Planned(100, 40, [0], [[0]], None)))
    assert progress.patches_expected == 40 + 3 * 100


def test_patches_may_be_known_before_any_slide_is_planned() -> None:
    progress = Progress(Clock())
    progress.begin(4, patches=40)
    explained(progress, 0, 12)
    assert progress.numbers().to_json()["patches"] == {"done": 12, "planned": 40, "encoded": 0, "expected": 40}


def test_rate_and_time_left_follow_the_last_minutes() -> None:
    clock = Clock()
    progress = Progress(clock)
    progress.begin(1)
    planned(progress, 0, 10_000)
    assert progress.left_s() is None
    for _ in range(100):  # 1 patch a second, then 10
        clock.now += 1
        explained(progress, 0, 1)
    assert progress.rate() == pytest.approx(1, rel=0.05)
    for _ in range(200):
        clock.now += 1
        explained(progress, 0, 10)
    assert progress.rate() == pytest.approx(10, rel=0.05)
    assert progress.left_s() == pytest.approx((10_000 - 2100) / 10, rel=0.05)
    progress.slide_done(record(0))
    assert progress.left_s() == 0


def test_a_run_of_weeks_still_has_a_rate() -> None:
    clock = Clock()
    progress = Progress(clock)
    progress.begin(1)
    for _ in range(2000):
        clock.now += 1000
        explained(progress, 0, 5000)
    assert progress.rate() == pytest.approx(5, rel=0.3)


def test_shares_of_a_worker_count_from_its_first_task() -> None:
    clock = Clock()
    progress = Progress(clock)
    progress.begin(1, readers=2)
    clock.now += 90
    explained(progress, 0, 50, "late:1", seconds=10, waited_s=2, model_s=7, read_s=8)
    worker = progress.numbers().to_json()["workers"]["late:1"]
    assert worker["since_s"] == pytest.approx(80)
    assert [worker[key] for key in ("patches_per_s", "model", "waiting", "reading")] == pytest.approx(
        [5, 0.7, 0.2, 0.4]
    )
    explained(progress, 0, 50, "late:1", seconds=10, model_s=100)
    assert progress.numbers().workers["late:1"].model == 1.0


def test_stages_sum_up_and_retries_count() -> None:
    progress = Progress(Clock())
    for _ in range(3):
        progress.task_done(Task(STITCH, entry(), (0,)), Performed(None, 2.0, "w"))
    progress.task_done(Task(STITCH, entry(), (1,)), Performed(None, error="died", again=True))
    progress.task_done(Task(STITCH, entry(), (1,)), Performed(None, error="died"))
    told = progress.numbers().to_json()
    assert told["stages"] == {"stitch": {"tasks": 3, "seconds": 6.0}}
    assert told["retries"] == 1
    assert told["patches"]["expected"] == 0


def test_a_thousand_slides_of_one_cause_are_one_cause() -> None:
    progress = Progress(Clock())
    for number in range(1000):
        progress.slide_done(record(number, "failed", f"/slides/{number}.svs: not a slide; convert it"))
    progress.slide_done(record(2000, "failed", "other"))
    first, second = progress.causes()
    assert first == FailureCause("not a slide; convert it", 1000, [f"{i}.svs" for i in range(NAMED)])
    assert second.count == 1


def test_what_is_told_stays_small() -> None:
    progress = Progress(Clock())
    for number in range(500):
        progress.slide_done(record(number, "failed", f"cause {number}", seconds=number % 100))
    told = progress.numbers().to_json()
    assert len(told["failures"]) == CAUSES + 1
    assert sum(cause["count"] for cause in told["failures"]) == 500
    assert [item["seconds"] for item in told["slowest"]] == [99.0] * 5 + [98.0] * (SLOWEST - 5)


def test_slides_that_had_ended_are_not_slow_ones() -> None:
    progress = Progress(Clock())
    progress.slide_done(record(0, seconds=100, skipped=True))
    assert (progress.skipped, progress.numbers().slowest) == (1, [])


@given(st.floats(0, 1e7))
def test_durations_are_right_to_their_last_unit(seconds: float) -> None:
    sizes = {"d": 86400, "h": 3600, "min": 60, "s": 1}
    parts = format_duration(seconds).split()
    units = parts[1::2]
    value = sum(int(count) * sizes[unit] for count, unit in zip(parts[::2], units, strict=True))
    assert value <= round(seconds) < value + sizes[units[-1]]


def test_passes_over_the_slides_are_counted_one_by_one() -> None:
    clock = Clock()
    progress = Progress(clock)
    progress.begin(2, patches=30)
    assert progress.numbers().part is None
    for number, (name, patches) in enumerate((("measuring", 30), ("sorting", 30), ("covering", 12))):
        progress.begin_part(Part(number + 1, 3, name), 2, patches)
        clock.now += 10
        explained(progress, 0, 10)
        assert progress.passes == (10, patches)
        part = progress.numbers().part
        assert (str(part), part and (part.done, part.patches)) == (f"pass {number + 1} of 3, {name}", (10, patches))
        assert progress.left_s() == pytest.approx((patches - 10) / progress.rate())
        explained(progress, 0, patches - 10)
        if number == 0:
            progress.slide_done(record(0))
            progress.slide_done(record(1))
    numbers = progress.numbers()
    assert (numbers.patches.done, numbers.patches.expected) == (72, 72)
    assert numbers.slides.done == 2
    assert RunNumbers.from_json(json.loads(json.dumps(numbers.to_json()))) == numbers


def test_a_pass_whose_patches_are_drawn_as_it_goes() -> None:
    progress = Progress(Clock())
    progress.begin(3)
    progress.begin_part(Part(1, 3, "measuring"), 3, None)
    assert progress.passes == (0, 0)
    planned(progress, 0, 40)
    planned(progress, 1, 20)
    explained(progress, 0, 10)
    assert progress.passes == (10, 90)  # of the third slide as many as in the mean
    progress.begin_part(Part(2, 3, "sorting"), 3, 60)
    assert progress.passes == (0, 60)
