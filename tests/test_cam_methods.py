"""Methods of activation and gradient agree with loops over plain numbers and with others' code, raw and signed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import pytest
import torch
from captum.attr import LayerGradCam
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import oracles
from tests.split_models import (
    CLASSES,
    MODELS,
    Split,
    activation_and_gradient,
    curved,
    last,
    of_class,
    of_classes,
    perceptron,
    pictures,
    pooled,
    relative,
)
from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.cam.methods import (
    METHODS,
    PROBING,
    cam,
    eigencam,
    gradcam,
    gradcam_plus_plus,
    hirescam,
    layercam,
    xgradcam,
)
from wsi_gradcam.cam.targets import COMPARED, GAMMA, finer_score
from wsi_gradcam.errors import LayerError, TargetError

ImageOracle = Callable[[Tensor, Tensor], list[list[float]]]
ORACLES: dict[str, ImageOracle] = {
    "gradcam": oracles.gradcam_of_image,
    "gradcam++": oracles.gradcam_plus_plus_of_image,
    "hirescam": oracles.hirescam_of_image,
    "layercam": oracles.layercam_of_image,
    "xgradcam": oracles.xgradcam_of_image,
    "eigencam": oracles.eigencam_of_image,
}
LINEAR = ("gradcam", "hirescam", "xgradcam")  # in the gradient
METHODS_BUT_CAM = sorted(set(METHODS) - {"cam"})  # it refuses gradients that differ between cells


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Split:
    return MODELS[request.param]()


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Activation and gradient of any sign and scale, with dead channels."""
    shape = [draw(st.integers(1, most)) for most in (4, 6, 5, 5)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    A, g = torch.randn(2, *shape, generator=generator)
    A, g = A * 10 ** draw(st.integers(-3, 3)), g * 10 ** draw(st.integers(-3, 3))
    alive = torch.rand(2, shape[0], shape[1], 1, 1, generator=generator) > draw(st.sampled_from([0.0, 0.3, 1.0]))
    return (A.relu() if draw(st.booleans()) else A) * alive[0], g * alive[1]


def alone(method: Callable[[Tensor, Tensor], Tensor], A: Tensor, g: Tensor) -> Tensor:
    return torch.cat([method(A[i : i + 1], g[i : i + 1]) for i in range(len(A))])


# --- the registries ---


def test_what_is_known_of_methods_is_known_of_those_that_exist() -> None:
    assert set(METHODS).isdisjoint(PROBING)
    assert {name for name, info in METHOD_INFO.items() if info.asks == "gradient"} == set(METHODS)
    assert {name for name, info in METHOD_INFO.items() if info.asks == "model"} == set(PROBING)
    assert all(info.grid == "layer" for info in METHOD_INFO.values() if info.asks == "gradient")
    assert all(info.unit == "logit" for info in METHOD_INFO.values() if info.scale == "cells")


@pytest.mark.parametrize("name", [name for name in METHODS if METHOD_INFO[name].unit == "logit"])
def test_what_a_heatmap_shows_has_the_logit_for_its_mean_where_that_is_promised(name: str) -> None:
    model, images = pooled(), pictures()
    with torch.no_grad():  # LayerCAM keeps the positive part alone
        linear = cast(nn.Linear, last(model.head))
        linear.weight.abs_()
    A, g = activation_and_gradient(model, images, of_class(1))
    shown = METHODS[name](A, g) * (A[0, 0].numel() if METHOD_INFO[name].scale == "cells" else 1)
    assert relative((shown.mean(dim=(1, 2)) + linear.bias[1])[:, None], model(images)[:, 1:2]) < 1e-5


# --- each method ---


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("classes", [[0, 0, 0], [3, 1, 2]], ids=["one class", "a class per image"])
def test_a_method_is_its_formula(name: str, classes: list[int], model: Split) -> None:
    A, g = activation_and_gradient(model, pictures(), of_classes(classes))
    assert relative(METHODS[name](A, g), oracles.one_by_one(ORACLES[name], A, g)) < 1e-5


@pytest.mark.parametrize("name", ["gradcam", "hirescam", "layercam", "xgradcam"])
@given(layer=layers())
def test_a_method_is_its_formula_for_any_layer(name: str, layer: tuple[Tensor, Tensor]) -> None:
    A, g = layer
    expected = oracles.one_by_one(ORACLES[name], A, g)
    sure = (A.sum(dim=(2, 3)).abs() > 1e-2 * A.abs().sum(dim=(2, 3))) | (A == 0).all(dim=3).all(dim=2)
    if name != "xgradcam" or bool(sure.all()):  # where a sum cancels, its last digits are the weight
        scale = float((A.abs() * g.abs()).sum(dim=(1, 2, 3)).max())
        assert float((METHODS[name](A, g) - expected).abs().max()) <= 1e-4 * scale


def test_cam_is_its_formula() -> None:
    A, g = activation_and_gradient(pooled(), pictures(), of_classes([0, 2, 1]))
    assert relative(cam(A, g), oracles.one_by_one(oracles.cam_of_image, A, g)) < 1e-5


def test_with_pooling_and_a_linear_layer_methods_that_add_up_are_one() -> None:
    model, images = pooled(), pictures()
    A, g = activation_and_gradient(model, images, of_class(2))
    linear = cast(nn.Linear, last(model.head))
    expected = torch.einsum("k,bkhw->bhw", linear.weight[2], A).detach()
    assert relative(cam(A, g), expected) < 1e-5
    for method in (gradcam, hirescam, xgradcam):
        assert relative(method(A, g) * A[0, 0].numel(), expected) < 1e-5
    total = cam(A, g).mean(dim=(1, 2)) + linear.bias[2]
    assert relative(total[:, None], model(images)[:, 2:3]) < 1e-5


@pytest.mark.parametrize("build", [curved, perceptron])
def test_cam_refuses_a_head_that_weighs_cells(build: Callable[[], Split]) -> None:
    A, g = activation_and_gradient(build(), pictures(), of_class(0))
    with pytest.raises(LayerError, match=r"global average pooling and a linear layer.*use gradcam"):
        cam(A, g)


def test_cam_refuses_a_batch_for_one_image() -> None:
    A, g = torch.rand(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    assert torch.isfinite(cam(A, g)).all()
    g[1, 2, 0, 0] = 1.01
    with pytest.raises(LayerError, match=r"by 0\.0\d+ of its largest value"):
        cam(A, g)


def test_cam_takes_rounding_for_rounding() -> None:
    A = torch.rand(1, 3, 7, 7)
    g = torch.tensor([1.0, -2e-3, 0.0])[None, :, None, None] * (1 + 1e-6 * torch.rand(1, 3, 7, 7))
    assert relative(cam(A, g), 49 * gradcam(A, g)) < 1e-5


def test_cam_passes_nan_on_to_be_reported_with_the_patch() -> None:
    A, g = torch.rand(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    g[0, 0] = torch.nan
    assert cam(A, g).isnan().all(dim=2).all(dim=1).tolist() == [True, False]


def test_gradcam_plus_plus_divides() -> None:
    """Where the division is made on a copy, as in torch-cam 0.5, the weight is 4 * 0.5³ instead of 4 * 0.5 / 7."""
    A = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    found = gradcam_plus_plus(A, torch.full((1, 1, 2, 2), 0.5))
    torch.testing.assert_close(found, A[:, 0] * 2 / 7)


def test_gradcam_plus_plus_does_not_underflow() -> None:
    """g² of 1e-30 is 0 in float32, and alpha then 0 / 0 or 0 instead of 1 / 2."""
    A = torch.rand(1, 2, 3, 3)
    found = gradcam_plus_plus(A, torch.full((1, 2, 3, 3), 1e-30))
    assert relative(found * 1e30, 9 / 2 * A.sum(dim=1)) < 1e-5


def test_gradcam_plus_plus_keeps_a_negative_divisor_and_drops_a_cancelled_one() -> None:
    A = torch.tensor([[[[-1.0, -3.0]], [[-1.0, -1.0]], [[1.0, 1.0]]]])
    g = torch.ones(1, 3, 1, 2)  # divisors 2 - 4, 2 - 2 and 2 + 2
    expected = 2 / -2 * A[:, 0] + 0 * A[:, 1] + 2 / 4 * A[:, 2]
    torch.testing.assert_close(gradcam_plus_plus(A, g), expected)
    nearly = -torch.nextafter(torch.tensor(2.0), torch.tensor(3.0))[None, None, None, None]  # but for rounding
    assert not gradcam_plus_plus(nearly, torch.ones(1, 1, 1, 1)).any()


def test_xgradcam_gives_channels_without_a_sum_no_weight() -> None:
    A = torch.tensor([[[[0.0, 0.0]], [[1.0, 3.0]], [[0.1, -0.1]]]])
    A[0, 2, 0, 1] = -torch.nextafter(torch.tensor(0.1), torch.tensor(1.0))  # what rounding leaves
    g = torch.tensor([[[[1.0, 2.0]], [[1.0, 2.0]], [[1.0, 2.0]]]])
    torch.testing.assert_close(xgradcam(A, g), A[:, 1] * 7 / 4)


@given(layer=layers())
def test_xgradcam_has_the_sum_of_hirescam(layer: tuple[Tensor, Tensor]) -> None:
    A, g = layer[0].abs().double(), layer[1].double()
    found, expected = (method(A, g).sum(dim=(1, 2)) for method in (xgradcam, hirescam))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9 * float((A * g).abs().sum()))


def test_layercam_is_hirescam_where_the_gradient_is_positive() -> None:
    A, g = torch.randn(2, 4, 3, 3), torch.rand(2, 4, 3, 3)
    assert torch.equal(layercam(A, g), hirescam(A, g))
    assert not layercam(A, -g).any()


@pytest.mark.parametrize("shape", [(2, 5, 3, 2), (2, 6, 3, 2), (2, 7, 3, 2), (1, 1, 4, 4), (1, 9, 1, 1)])
@pytest.mark.parametrize("signed", [True, False])
def test_eigencam_is_a_singular_vector_whichever_gram_matrix_is_smaller(
    shape: tuple[int, int, int, int], signed: bool
) -> None:
    A = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    A = A if signed else A.relu()
    found = eigencam(A, torch.zeros_like(A))
    assert relative(found, oracles.one_by_one(oracles.eigencam_of_image, A, A)) < 1e-5


def test_eigencam_does_not_centre() -> None:
    A = torch.tensor([3.0, 4.0])[None, :, None, None].expand(1, 2, 3, 3)  # centred, nothing would be left
    torch.testing.assert_close(eigencam(A, A), torch.full((1, 3, 3), 5.0))


def test_eigencam_is_not_negative_behind_a_relu() -> None:
    A = torch.randn(6, 8, 4, 4, generator=torch.Generator().manual_seed(5)).relu()
    assert float(eigencam(A, A).min()) > -1e-6


def test_eigencam_does_not_let_an_image_that_is_not_finite_stop_the_others() -> None:
    A = torch.rand(3, 4, 3, 3)
    A[1, 0, 0, 0] = torch.inf
    found = eigencam(A, A)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], eigencam(A[[0, 2]], A[[0, 2]]))


# --- what holds for all ---


@pytest.mark.parametrize("name", METHODS_BUT_CAM)
@given(layer=layers())
def test_a_map_is_finite_and_the_images_own(name: str, layer: tuple[Tensor, Tensor]) -> None:
    A, g = layer
    found = METHODS[name](A, g)
    assert found.shape == (A.shape[0], *A.shape[2:])
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    scale = float(found.abs().max())
    torch.testing.assert_close(found, alone(METHODS[name], A, g), rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(METHODS[name](A.flip(0), g.flip(0)).flip(0), found, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("zero", ["A", "g", "both"])
def test_zeros_give_zeros(method: Callable[[Tensor, Tensor], Tensor], zero: str) -> None:
    A = torch.zeros(2, 3, 4, 4) if zero != "g" else torch.rand(2, 3, 4, 4)
    g = torch.zeros(2, 3, 4, 4) if zero != "A" else torch.ones(2, 3, 4, 4)
    found = method(A, g)
    assert torch.isfinite(found).all()
    if not (zero == "g" and method is eigencam):
        assert not found.any()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_nothing_is_changed_in_place(method: Callable[[Tensor, Tensor], Tensor]) -> None:
    A, g = torch.randn(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    before = A.clone(), g.clone()
    method(A, g)
    assert torch.equal(A, before[0])
    assert torch.equal(g, before[1])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_images_are_not_stretched_to_the_same_range(method: Callable[[Tensor, Tensor], Tensor]) -> None:
    """pytorch-grad-cam stretches each image's map to 0..1, twice, so that a faint image looks like a strong one."""
    A = torch.rand(1, 5, 4, 4, generator=torch.Generator().manual_seed(1)) + 0.1
    g = torch.tensor([1.0, 0.5, 2.0, 0.1, 0.3])[None, :, None, None].expand_as(A)
    maps = method(torch.cat([A, A / 1000]), torch.cat([g, g]))
    assert float(maps[1].abs().max()) < 0.02 * float(maps[0].abs().max())
    assert float(maps.min()) > 0  # nor shifted: nothing of this image speaks against the class


@pytest.mark.parametrize("name", [*LINEAR, "cam"])
def test_evidence_against_a_class_is_negative(name: str) -> None:
    A, g = activation_and_gradient(pooled() if name == "cam" else curved(), pictures(), of_class(0))
    found = METHODS[name](A, g)
    assert (found < 0).any()
    assert (found > 0).any()
    torch.testing.assert_close(METHODS[name](A, -g), -found)


# --- others' code ---


def test_gradcam_is_captums(model: Split) -> None:
    A, g = activation_and_gradient(model, pictures(), of_class(3))
    expected = LayerGradCam(model, model.features).attribute(pictures(), target=3, relu_attributions=False)
    assert relative(gradcam(A, g), expected[:, 0].detach()) < 1e-5


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("gradcam", "GradCAM"),
        ("gradcam++", "GradCAMPlusPlus"),
        ("hirescam", "HiResCAM"),
        ("layercam", "LayerCAM"),
        ("xgradcam", "XGradCAM"),
    ],
)
def test_raw_maps_are_pytorch_grad_cams(name: str, theirs: str, model: Split) -> None:
    package = pytest.importorskip("pytorch_grad_cam", reason="only the bench extra installs pytorch-grad-cam")
    A, g = activation_and_gradient(model, pictures(), of_class(1))
    A, g = A.abs(), g * 1000  # their additions of 1e-6 and 1e-7 to divisors shall not show
    with getattr(package, theirs)(model, [model.features]) as other:
        expected = other.get_cam_image(pictures(), model.features, None, A.numpy(), g.numpy(), False)
    assert relative(METHODS[name](A, g), torch.from_numpy(expected)) < 1e-5


@pytest.mark.parametrize("build", [pooled, perceptron])  # it taps behind the in-place ReLU of `curved`
@pytest.mark.parametrize("name", ["gradcam", "layercam", "xgradcam"])
def test_positive_parts_are_torch_cams(name: str, build: Callable[[], Split]) -> None:
    methods = pytest.importorskip("torchcam.methods", reason="only the bench extra installs torch-cam")
    model, images = build(), pictures()
    extractor = {"gradcam": methods.GradCAM, "layercam": methods.LayerCAM, "xgradcam": methods.XGradCAM}[name]
    with extractor(model, "features", input_shape=(3, 32, 24)) as other:
        (expected,) = other([1] * len(images), model(images), normalized=False)
    found = METHODS[name](*activation_and_gradient(model, images, of_class(1)))
    assert relative(found.relu(), expected) < 1e-5


# --- Finer-CAM ---


def finer(
    logits: Tensor,
    classes: Tensor,
    gamma: float = GAMMA,
    compared: int = COMPARED,
    differentiate_weights: bool = True,
) -> Tensor:
    return finer_score(logits, classes, gamma, compared, differentiate_weights)(logits)


@pytest.mark.parametrize("gamma", [0.0, GAMMA, 1.0])
@pytest.mark.parametrize("compared", [1, COMPARED, 9])
def test_finer_score_is_its_formula(gamma: float, compared: int) -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(8)) * 3
    classes = torch.tensor([0, 1, 2, 3, 4, 0])
    found = finer(logits, classes, gamma, compared)
    expected = [
        oracles.finer_by_hand(row, own, gamma, compared)
        for row, own in zip(logits.tolist(), classes.tolist(), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def finer_maps(model: Split, images: Tensor, classes: Sequence[int]) -> Tensor:
    score = finer_score(model(images), torch.tensor(classes), differentiate_weights=False)
    return METHODS["finercam"](*activation_and_gradient(model, images, score))


def comparison(logits: Tensor, own: int, other: int) -> Tensor:
    return logits[:, own] - GAMMA * logits[:, other]


def test_finer_cam_with_constant_weights_is_the_mean_of_comparisons(model: Split) -> None:
    images, classes = pictures(), [0, 3, 1]
    expected = []
    for image, own, logits in zip(images[:, None], classes, model(images).detach(), strict=True):
        others = [d for d in range(CLASSES) if d != own]  # all three are compared
        shares = logits.softmax(dim=0)[others]
        layers_of = [activation_and_gradient(model, image, partial(comparison, own=own, other=d)) for d in others]
        maps = torch.cat([oracles.one_by_one(oracles.gradcam_of_image, A, g) for A, g in layers_of])
        expected.append(torch.einsum("d,dhw->hw", (shares / shares.sum()).double(), maps))
    assert relative(finer_maps(model, images, classes), torch.stack(expected)) < 1e-5


def test_finer_cam_with_constant_weights_adds_up_to_the_score() -> None:
    model, images, classes = pooled(), pictures(), torch.tensor([2, 0, 3])
    logits, bias = model(images).detach(), cast(nn.Linear, last(model.head)).bias.detach()
    score = finer(logits, classes)
    shares = torch.stack([row.softmax(dim=0).scatter(0, own, 0.0) for row, own in zip(logits, classes, strict=True)])
    biases = bias[classes] - GAMMA * (shares * bias).sum(dim=1) / shares.sum(dim=1)
    maps = finer_maps(model, images, classes.tolist())
    torch.testing.assert_close(maps.sum(dim=(1, 2)) + biases, score, rtol=1e-5, atol=1e-6)


def test_finer_score_asked_again_compares_with_the_same_classes() -> None:
    """As the class predicted, those like it belong to the unchanged image."""
    score = finer_score(torch.tensor([[3.0, 2.0, -9.0]]), torch.tensor([0]), gamma=1.0, compared=1)
    assert float(score(torch.tensor([[3.0, -9.0, 2.0]]))) == 12.0


@pytest.mark.parametrize("differentiate_weights", [True, False])
def test_finer_score_of_two_classes_compares_with_the_other(differentiate_weights: bool) -> None:
    logits = torch.tensor([[1.0, 3.0], [-2.0, 0.5]], requires_grad=True)
    classes = torch.tensor([0, 1])
    score = finer(logits, classes, differentiate_weights=differentiate_weights)
    torch.testing.assert_close(score, torch.tensor([1.0 - GAMMA * 3.0, 0.5 + GAMMA * 2.0]))
    (gradient,) = torch.autograd.grad(score.sum(), logits)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -GAMMA], [-GAMMA, 1.0]]))


def test_finer_score_never_compares_a_class_with_itself() -> None:
    """Also where another logit is the same: by rank alone, as elsewhere, the class could stand behind it."""
    logits = torch.tensor([[2.0, 2.0, -1.0]], requires_grad=True)
    for own in (0, 1):
        score = finer(logits, torch.tensor([own]), gamma=1.0, compared=1)
        (gradient,) = torch.autograd.grad(score.sum(), logits)
        expected = [-1.0, -1.0, 0.0]
        expected[own] = 1.0
        assert gradient[0].tolist() == expected


def test_finer_score_of_one_logit_is_refused() -> None:
    with pytest.raises(TargetError, match="has one logit; use gradcam"):
        finer(torch.ones(2, 1), torch.tensor([0, 0]))


def test_finer_score_does_not_underflow() -> None:
    logits = torch.tensor([[500.0, -400.0, -401.0, -900.0]], requires_grad=True)
    score = finer(logits, torch.tensor([0]), gamma=1.0, differentiate_weights=False)
    share = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(score, torch.tensor([500 + 400 * share + 401 * (1 - share)]))
    (gradient,) = torch.autograd.grad(score.sum(), logits)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -share, share - 1, 0.0]]))


def test_finer_score_is_differentiated_as_its_documentation_says() -> None:
    logits = torch.tensor([[2.0, 1.5, 0.0, -1.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(finer(logits, torch.tensor([0])).sum(), logits)
    q = logits[0, 1:].detach().softmax(dim=0)
    s = logits[0, 1:].detach()
    torch.testing.assert_close(gradient[0, 1:], -GAMMA * q * (1 + s - (q * s).sum()))
    assert float(gradient[0, 3]) > 0 > float(gradient[0, 1])


def test_finer_score_is_pytorch_grad_cams() -> None:
    targets = pytest.importorskip(
        "pytorch_grad_cam.utils.model_targets", reason="only the bench extra installs pytorch-grad-cam"
    )
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(2), requires_grad=True)
    classes = logits.detach().argmax(dim=1)
    found = finer(logits, classes, gamma=1.0)
    ranks = (logits.detach() - logits.detach().amax(dim=1, keepdim=True)).abs().argsort(dim=1)
    expected = torch.stack(
        [targets.FinerWeightedTarget(int(r[0]), r[1:4].tolist(), 1)(row) for r, row in zip(ranks, logits, strict=True)]
    )
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(score.sum(), logits, retain_graph=True)[0] for score in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_the_finer_score_of_a_row_is_its_own() -> None:
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(4))
    classes = torch.tensor([0, 5, 2, 2, 1])
    each = torch.cat([finer(logits[i : i + 1], classes[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(finer(logits, classes), each)
