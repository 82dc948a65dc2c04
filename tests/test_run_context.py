"""What a process keeps between its tasks: the slide that is open, the model."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.runs import SMALL, toy_spec
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.run.context import Context
from wsi_gradcam.run.examining import examine_model
from wsi_gradcam.run.plan import plan_run
from wsi_gradcam.run.settings import make_settings
from wsi_gradcam.run.workload import ExplainWorkload


def entry(number: int) -> SlideEntry:
    return SlideEntry(f"{number}", f"/{number}")


class FakeSlide:
    """A slide that knows whether it is open."""

    def __init__(self, path: str, *_: Any) -> None:
        self.path, self.open = path, True
        self.info = SimpleNamespace(path=path, digest="digest")

    def close(self) -> None:
        self.open = False


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context[ExplainWorkload]:
    spec = toy_spec("poisoned")
    run = plan_run(tmp_path, spec, examine_model(spec, make_settings(**SMALL), []).facts, make_settings(**SMALL))
    monkeypatch.setattr("wsi_gradcam.run.context.open_entry", FakeSlide)
    return Context(ExplainWorkload(run))


def test_a_slide_in_use_is_never_closed(context: Context[ExplainWorkload]) -> None:
    """Threads of a worker work on different slides."""
    with context.slide(entry(0)) as first, context.slide(entry(1)) as second:
        with context.slide(entry(0)) as again:
            assert again is first
        assert first.open  # type: ignore[attr-defined]
        assert second.open  # type: ignore[attr-defined]


def test_the_last_two_slides_stay_open_for_the_next_tasks(context: Context[ExplainWorkload]) -> None:
    """The one in work and the next: not the one that was opened first, but the one that was used first, is closed."""
    with context.slide(entry(0)) as first, context.slide(entry(1)) as second:
        pass
    with context.slide(entry(0)) as again:
        assert again is first
    with context.slide(entry(2)):
        assert first.open  # type: ignore[attr-defined]
        assert not second.open  # type: ignore[attr-defined]


def test_close_releases_the_slides(context: Context[ExplainWorkload]) -> None:
    with pytest.raises(KeyError), context.slide(entry(0)) as slide:
        raise KeyError
    context.close()
    assert not slide.open  # type: ignore[attr-defined]


PLANNED = SimpleNamespace(stain=None, slide_digest="digest", patch_mpp=lambda *_: 0.5)


def test_slides_are_worked_on_while_the_model_is_loaded(
    context: Context[ExplainWorkload], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU that takes minutes where the network is compiled."""
    loading, may_end = threading.Event(), threading.Event()

    def load(*_: Any) -> str:
        loading.set()
        assert may_end.wait(60)
        return "loaded"

    monkeypatch.setattr("wsi_gradcam.cam.explainer.Explainer.load", load)
    monkeypatch.setattr(context, "plan", lambda _: PLANNED)
    monkeypatch.setattr("wsi_gradcam.run.context.PatchReader", lambda *_: SimpleNamespace(close=lambda: None))
    with ThreadPoolExecutor(1) as pool:
        model = pool.submit(context.model)
        assert loading.wait(60)
        with context.patches(entry(0)) as reader:
            assert reader is not None
        assert not model.done()
        may_end.set()
        assert model.result() == "loaded"  # type: ignore[comparison-overlap]


def test_a_worker_with_another_model_refuses(context: Context[ExplainWorkload]) -> None:
    from wsi_gradcam.errors import ModelError

    object.__setattr__(context.run, "spec", toy_spec("other_linear"))
    with pytest.raises(ModelError, match="loaded a different model from the one the run began with"):
        context.model()
