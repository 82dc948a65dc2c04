"""The model at work: uint8 patches in, logits and maps out, whatever the batch and the memory."""

from __future__ import annotations

import dataclasses
import logging
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.runs import toy_spec
from tests.split_models import Split, curved, relative
from wsi_gradcam.cam import explainer as explaining
from wsi_gradcam.cam.engine import Lane, explain_batch
from wsi_gradcam.cam.explainer import Explainer, Request
from wsi_gradcam.cam.explainer import examine as plain_examine
from wsi_gradcam.cam.facts import Choice
from wsi_gradcam.cam.program import EagerProgram, Pass
from wsi_gradcam.cam.targets import Target
from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.load import Model, load_model, model_of
from wsi_gradcam.models.spec import Resizing
from wsi_gradcam.models.transform import Transform, make_transform

Rgb = npt.NDArray[np.uint8]
TARGETS = [Target("b", 1), Target("predicted"), Target("a-c", 0, 2)]
METHODS = ["gradcam", "hirescam"]


@pytest.fixture
def model() -> Model:
    return model_of(curved(), patch_px=(32, 24), classes=("a", "b", "c", "d"), layer="features")


@pytest.fixture
def rgb() -> Rgb:
    return np.random.default_rng(1).integers(0, 256, (6, 32, 24, 3), np.uint8)


def explainer_of(model: Model, **request: Any) -> Explainer:
    return Explainer.examine(model, Request(**{"batch_size": 6, **request}), lambda model: None)


class Small(EagerProgram):
    """Fails for batches above `most`, as devices do."""

    most = 2
    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def __init__(self, explainer: Explainer) -> None:
        inner = explainer._program
        assert isinstance(inner, EagerProgram)
        super().__init__(inner.module, inner.layers)
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Pass:
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise self.error
        return super().forward(images)


def limited(explainer: Explainer, program: type[Small] = Small) -> Small:
    """The explainer, given a program that fails; which is returned."""
    small = program(explainer)
    explainer._program = small
    return small


def test_logits_and_maps_are_the_models(model: Model, rgb: Rgb) -> None:
    logits, maps = explainer_of(model).explain(rgb, TARGETS, METHODS)
    images = model.prepare(torch.from_numpy(rgb))
    network = model.module
    assert isinstance(network, Split)
    leaf = network.features(images).detach().requires_grad_(True)
    expected = network.head(leaf.clone())
    assert relative(torch.from_numpy(logits), expected) < 1e-5
    assert maps.shape == (6, 6, 8, 6)
    assert maps.dtype == logits.dtype == np.float32
    scores = [expected[:, 1], expected.amax(dim=1), expected[:, 0] - expected[:, 2]]
    for t, score in enumerate(scores):
        (g,) = torch.autograd.grad(score.sum(), leaf, retain_graph=True)
        for m, wanted in enumerate([g.mean(dim=(2, 3), keepdim=True) * leaf, g * leaf]):
            assert relative(torch.from_numpy(maps[:, 3 * m + t]), wanted.sum(dim=1)) < 1e-5


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_fewer_patches_than_a_batch_are_the_same_to_the_last_bit(count: int, model: Model, rgb: Rgb) -> None:
    explainer = explainer_of(model)
    program = limited(explainer, type("Any", (Small,), {"most": 99}))
    logits, maps = explainer.explain(rgb, TARGETS, METHODS)
    some_logits, some_maps = explainer.explain(rgb[:count], TARGETS, METHODS)
    assert np.array_equal(some_logits, logits[:count])
    assert np.array_equal(some_maps, maps[:count])
    assert program.sizes == [6, 6]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        MemoryError("std::bad_alloc"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB, other allocations: 1 MB, max allowed: 18 GB)"),
    ],
)
@pytest.mark.parametrize(("most", "sizes"), [(3, [6, 3, 3]), (2, [6, 3, 2, 2, 2]), (5, [6, 3, 3])])
def test_out_of_memory_halves_the_batch_and_loses_nothing(
    error: Exception, most: int, sizes: list[int], model: Model, rgb: Rgb, caplog: pytest.LogCaptureFixture
) -> None:
    expected = explainer_of(model).explain(rgb, TARGETS, [*METHODS, "gradient", "ablationcam"])
    explainer = explainer_of(model)
    program = limited(explainer, type("Some", (Small,), {"most": most, "error": error}))
    with caplog.at_level(logging.INFO, "wsi_gradcam"):
        found = explainer.explain(rgb, TARGETS, [*METHODS, "gradient", "ablationcam"])
    assert program.sizes == sizes
    assert caplog.messages == [f"out of memory with 6 patches at once; using at most {min(sizes)} from now on"]
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        flat = (
            torch.from_numpy(values).flatten(2) if values.ndim > 2 else torch.from_numpy(values)
            for values in (one, other)
        )
        assert relative(*flat) < 1e-4


def test_what_fits_is_kept_to(model: Model, rgb: Rgb, caplog: pytest.LogCaptureFixture) -> None:
    """A larger batch would fail again each time, after all the work that was done by then."""
    explainer = explainer_of(model)
    program = limited(explainer, type("Some", (Small,), {"most": 3}))
    first = explainer.explain(rgb, TARGETS, METHODS)
    assert explainer.at_once == 3
    program.sizes.clear()
    with caplog.at_level(logging.INFO, "wsi_gradcam"):
        second = explainer.explain(rgb, TARGETS, METHODS)
        explainer.explain(rgb[:2], TARGETS, METHODS)  # the other half of a batch would be what fills it up
        explainer.rate(TARGETS, METHODS)
    assert program.sizes[:3] == [3, 3, 3]
    assert max(program.sizes) == 3
    assert caplog.messages == []
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@dataclasses.dataclass(frozen=True)
class SmallTransform(Transform):
    """Prepares no more than two patches at once."""

    def __call__(self, rgb: Tensor) -> Tensor:
        if len(rgb) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().__call__(rgb)


def test_preparing_patches_takes_memory_too(model: Model, rgb: Rgb) -> None:
    explainer = explainer_of(model)
    expected = explainer.explain(rgb, TARGETS, METHODS)
    own = explainer.model.transform
    transform = SmallTransform(own.patch_px, own.mean, own.std)
    explainer.model = dataclasses.replace(model, transform=transform)
    found = explainer.explain(rgb, TARGETS, METHODS)
    assert explainer.at_once == 2
    assert relative(torch.from_numpy(found[0]), torch.from_numpy(expected[0])) < 1e-5


def test_a_model_is_examined_with_as_many_patches_as_fit(rgb: Rgb) -> None:
    spec = toy_spec("cramped")
    loaded = load_model(spec)
    explainer = explainer_of(loaded)
    assert explainer.facts.batch_size == 6  # what the results are of, on every worker
    assert explainer.at_once == 3
    again = Explainer.load(spec, explainer.facts, "cpu")
    assert again.at_once == 6  # nothing is run to make that program
    patches = np.resize(rgb, (6, 32, 32, 3))
    first, second = (each.explain(patches, TARGETS[:2], METHODS)[0] for each in (explainer, again))
    assert np.array_equal(first, second)
    assert again.at_once == 3


def test_one_patch_that_does_not_fit_is_an_error(model: Model, rgb: Rgb) -> None:
    explainer = explainer_of(model)
    program = limited(explainer, type("None_", (Small,), {"most": 0}))
    with pytest.raises(torch.OutOfMemoryError):
        explainer.explain(rgb, TARGETS, METHODS)
    assert program.sizes == [6, 3, 2, 1]


def test_another_error_is_not_tried_again(model: Model, rgb: Rgb) -> None:
    explainer = explainer_of(model)
    program = limited(explainer, type("Wrong", (Small,), {"most": 0, "error": RuntimeError("mat1 and mat2 shapes")}))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        explainer.explain(rgb, TARGETS, METHODS)
    assert program.sizes == [6]


def test_maps_of_pixels_are_summed_over_the_cells_of_the_layer(model: Model, rgb: Rgb) -> None:
    explainer = explainer_of(model, methods=("gradcam",))
    _, maps = explainer.explain(rgb, TARGETS[:1], ["integrated_gradients", "gradient", "gradcam"])
    assert maps.shape == (6, 3, 8, 6)
    images = model.prepare(torch.from_numpy(rgb))
    fine = explain_batch(explainer._program, images, TARGETS[:1], ["integrated_gradients", "gradient"]).cams
    cells = {name: values[:, 0].reshape(6, 8, 4, 6, 4) for name, values in fine.items()}
    summed = torch.from_numpy(maps[:, 0])
    assert relative(summed, cells["integrated_gradients"].sum(dim=(2, 4))) < 1e-4  # what adds up goes on to do so
    assert relative(torch.from_numpy(maps[:, 1]), cells["gradient"].mean(dim=(2, 4))) < 1e-5


def test_the_order_of_maps_is_that_of_methods_then_targets(model: Model, rgb: Rgb) -> None:
    explainer = explainer_of(model)
    _, maps = explainer.explain(rgb, TARGETS, METHODS)
    for m, method in enumerate(METHODS):
        for t, target in enumerate(TARGETS):
            _, single = explainer.explain(rgb, [target], [method])
            np.testing.assert_allclose(maps[:, 3 * m + t], single[:, 0], rtol=1e-4, atol=1e-8)


def test_threads_take_turns(model: Model, rgb: Rgb) -> None:
    """A tap is a hook on the network that all threads share."""
    explainer = explainer_of(model)
    expected = explainer.explain(rgb, TARGETS, METHODS)
    found: list[Any] = []

    def work() -> None:
        found.extend(explainer.explain(rgb, TARGETS, METHODS) for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    assert all(np.array_equal(a, b) for each in found for a, b in zip(each, expected, strict=True))
    assert not any(part._forward_hooks for part in model.module.modules())


@pytest.mark.parametrize(("engine", "precision"), [("eager", "float32"), ("eager", "bfloat16")])
def test_another_process_has_the_same_explainer(engine: str, precision: str) -> None:
    spec = toy_spec("pooled_linear")
    first = explainer_of(load_model(spec), engine=engine, precision=precision)
    second = Explainer.load(spec, first.facts, "cpu")
    rgb = np.random.default_rng(2).integers(0, 256, (5, 32, 32, 3), np.uint8)
    assert first.facts.choice == Choice(engine, precision)
    for a, b in zip(*(each.explain(rgb, TARGETS[:2], METHODS) for each in (first, second)), strict=True):
        assert np.array_equal(a, b)


def test_another_model_under_the_same_name_is_refused() -> None:
    spec = toy_spec("pooled_linear")
    facts = dataclasses.replace(explainer_of(load_model(spec)).facts, digest="of another")
    with pytest.raises(
        ModelError, match="pooled_linear: this worker loaded a different model from the one the run began"
    ):
        Explainer.load(spec, facts, "cpu")


def test_patches_are_asked_for_only_where_a_choice_needs_them(
    model: Model, rgb: Rgb, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Model] = []
    given: list[Tensor | None] = []

    def examine(model: Model, request: Request, patches: Tensor | None) -> Any:
        given.append(patches)
        return plain_examine(model, dataclasses.replace(request, engine="eager", precision="float32"), patches)

    monkeypatch.setattr(explaining, "examine", examine)

    def patches(of: Model) -> Rgb:
        asked.append(of)
        return rgb

    Explainer.examine(model, Request(batch_size=2), patches)
    assert not asked
    assert given == [None]
    Explainer.examine(model, Request(engine="auto", batch_size=2), patches)
    assert asked == [model]
    assert given[1] is not None
    assert torch.equal(given[1], torch.from_numpy(rgb))
    Explainer.examine(model, Request(engine="auto", choice=Choice("eager", "float32"), batch_size=2), patches)
    assert len(asked) == 1


def test_layers_that_could_be_explained(model: Model) -> None:
    names = [layer.name for layer in explainer_of(model).layers()]
    assert names[:5] == ["features.0", "features.1", "features.2", "features.3", "features"]


def test_results_may_be_asked_for_later_and_in_any_order(model: Model, rgb: Rgb) -> None:
    explainer = explainer_of(model)
    expected = [explainer.explain(part, TARGETS, METHODS) for part in (rgb, rgb[:2], rgb[::-1])]
    begun = [explainer.begin(part.copy(), TARGETS, METHODS) for part in (rgb, rgb[:2], rgb[::-1])]
    for found, wanted in reversed(list(zip(begun, expected, strict=True))):
        for a, b in zip(found(), wanted, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_whole_batch_travels_from_where_it_was_read_and_a_part_is_filled_up(model: Model, rgb: Rgb) -> None:
    lane, explainer = Lane(torch.device("cpu")), explainer_of(model)
    batch = explainer.empty(rgb.shape)
    batch[:] = rgb
    staged = lane.staged(batch, len(batch))
    assert staged.data_ptr() == batch.ctypes.data
    filled = lane.staged(batch[:4], 6)
    assert torch.equal(filled[:4], torch.from_numpy(rgb[:4]))
    assert not filled[4:].any()
    fixed = rgb.copy()
    fixed.flags.writeable = False
    assert torch.equal(lane.staged(fixed, 6), torch.from_numpy(rgb))
    (found,) = lane.fetch(lane.send(staged))()
    np.testing.assert_array_equal(found, rgb)


def test_the_model_resizes_where_patches_are_read(rgb: Rgb) -> None:
    model = model_of(curved(), patch_px=(32, 24), layer="features")
    resizing = dataclasses.replace(
        model, transform=make_transform((64, 48), model.mean, model.std, resizing=Resizing(resize=(32, 24)))
    )
    explainer = explainer_of(resizing)
    large = np.random.default_rng(2).integers(0, 256, (6, 64, 48, 3), np.uint8)
    small = np.stack([explainer.resized(patch) for patch in large])
    for a, b in zip(
        explainer.explain(small, TARGETS, METHODS), explainer.explain(large, TARGETS, METHODS), strict=True
    ):
        np.testing.assert_array_equal(a, b)
