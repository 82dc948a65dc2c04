"""Networks that end in a softmax or sigmoid: what goes into it is explained, once, and it is told."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from tests.programs import FORMS, save_program
from tests.runs import SMALL, rows_of, toy_values
from tests.synthetic import write_marker_slide
from wsi_gradcam import GradCAM, explain, open_result
from wsi_gradcam.audit.images import audit_images
from wsi_gradcam.cam.explainer import Request, examine
from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.load import load_model, model_of
from wsi_gradcam.models.spec import ModelSpec, probabilities

End = Callable[[Tensor], Any]


class Pooled(nn.Module):
    """A pooled ReLU and a linear layer, with logits of several units."""

    def __init__(self, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=4, padding=2), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU()
        )
        self.fc = nn.Linear(12, classes)
        with torch.no_grad():
            self.fc.weight *= 6

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Ending(nn.Module):
    """`Pooled` behind an end, a function or a module."""

    def __init__(self, end: End | None, classes: int = 3) -> None:
        super().__init__()
        self.net = Pooled(classes)
        self.end = end

    def forward(self, images: Tensor) -> Any:
        logits = self.net(images)
        return logits if self.end is None else self.end(logits)


class Gated(nn.Module):
    """Squeeze and excitation by a sigmoid, and attention by a softmax, before the logits."""

    def __init__(self, end: End | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.ReLU())
        self.gate, self.fc = nn.Linear(8, 8), nn.Linear(8, 2)
        self.end = end

    def forward(self, images: Tensor) -> Any:
        maps = self.features(images)
        maps = maps * torch.sigmoid(self.gate(maps.mean(dim=(2, 3))))[..., None, None]
        weights = maps.sum(dim=1).flatten(1).softmax(dim=1)
        logits = self.fc((maps.flatten(2) * weights[:, None]).sum(dim=2))
        return logits if self.end is None else self.end(logits)


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(4))
SOFTMAX: dict[str, End] = {
    "module": nn.Softmax(dim=1),
    "module of the last axis": nn.Softmax(dim=-1),
    "F.softmax": lambda z: F.softmax(z, dim=1),
    "method": lambda z: z.softmax(1),
    "torch.softmax": lambda z: torch.softmax(z, dim=-1),
    "in double": lambda z: F.softmax(z, dim=1, dtype=torch.float64).float(),
    "log": nn.LogSoftmax(dim=1),
    "F.log_softmax": lambda z: F.log_softmax(z, dim=1),
    "exp of log": lambda z: F.log_softmax(z, dim=1).exp(),
    "temperature": lambda z: (z / 2).softmax(1),
    "in space": lambda z: z[..., None, None].softmax(1),
    "cloned": lambda z: z.softmax(1).clone().view(len(z), -1).squeeze(),
    "dict": lambda z: {"prob": z.softmax(1), "maps": z[:, :, None]},
    "tuple": lambda z: (z.softmax(1), z.argmax(1)),
    "compiled operator": lambda z: torch.ops.aten.softmax.int(z, 1),
}
SIGMOID: dict[str, End] = {
    "module": nn.Sigmoid(),
    "torch.sigmoid": torch.sigmoid,
    "in place": lambda z: z.sigmoid_(),
    "expit": torch.special.expit,
    "log": F.logsigmoid,
    "heads": lambda z: torch.cat([torch.sigmoid(z[:, i : i + 1]) for i in range(z.shape[1])], dim=1),
    "dict": lambda z: {"scores": torch.sigmoid(z)},
}


def expected_logits(end: str, classes: int = 3) -> Tensor:
    logits = Ending(None, classes)(IMAGES).detach()
    return logits / 2 if end == "temperature" else logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", list(SOFTMAX))
def test_the_input_of_a_last_softmax_is_explained(name: str) -> None:
    model = model_of(Ending(SOFTMAX[name]).eval(), name="n", patch_px=32)
    assert torch.allclose(model.module(IMAGES), expected_logits(name), atol=1e-5)
    assert model.activation == "softmax"
    assert any("softmax" in note and "explained" in note for note in model.notes)
    assert examine(model, Request(batch_size=4)).facts.notes == model.notes


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("name", list(SIGMOID))
def test_the_input_of_a_last_sigmoid_is_explained(name: str, classes: int) -> None:
    model = model_of(Ending(SIGMOID[name], classes).eval(), name="n", patch_px=32)
    assert torch.allclose(model.module(IMAGES), expected_logits(name, classes), atol=1e-5)
    assert model.activation == "sigmoid"
    assert any("sigmoid" in note for note in model.notes)


@pytest.mark.parametrize("squeeze", [lambda z: torch.sigmoid(z).squeeze(1), lambda z: torch.sigmoid(z[:, 0])])
def test_one_probability_without_an_axis(squeeze: End) -> None:
    model = model_of(Ending(squeeze, 1).eval(), name="n", patch_px=32)
    assert torch.allclose(model.module(IMAGES), expected_logits("", 1), atol=1e-5)
    assert model.activation == "sigmoid"


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.Sigmoid()])
def test_gates_and_attention_stay(end: nn.Module) -> None:
    assert torch.allclose(model_of(Gated(end).eval(), name="n", patch_px=32).module(IMAGES), Gated()(IMAGES), atol=1e-5)
    plain = model_of(Gated().eval(), name="n", patch_px=32)
    assert torch.equal(plain.module(IMAGES), Gated()(IMAGES))
    assert plain.notes == ()


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.Sigmoid(), nn.LogSoftmax(1)])
def test_maps_are_those_of_the_network_without_its_end(end: nn.Module) -> None:
    found, expected = (
        GradCAM(Ending(each).eval(), "net.features", list(METHOD_INFO), engine="eager", precision="float32")(IMAGES)
        for each in (end, None)
    )
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    for method, maps in expected.by_method.items():
        assert torch.allclose(found.by_method[method], maps, rtol=1e-4, atol=1e-5 * float(maps.abs().max())), method


@pytest.mark.parametrize(("engine", "precision"), [("openvino", "float32"), ("eager", "bfloat16")])
def test_engines_explain_the_same_network(engine: str, precision: str) -> None:
    model = model_of(Ending(nn.Softmax(1)).eval(), name="n", patch_px=32)
    program = examine(model, Request(engine=engine, precision=precision, batch_size=4)).program
    assert torch.allclose(program.predict(IMAGES), expected_logits(""), rtol=0.05, atol=0.05)


def test_a_live_network_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "wsi_gradcam"):
        found = GradCAM(Ending(torch.sigmoid, 1).eval())(IMAGES)
    assert torch.allclose(found.logits, expected_logits("", 1), atol=1e-5)
    assert "ends in sigmoid" in caplog.text


class Scripted(nn.Module):
    """Small enough for TorchScript."""

    def __init__(self, softmax: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.softmax = softmax
        self.conv, self.fc = nn.Conv2d(3, 8, 8, stride=8), nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.fc(torch.relu(self.conv(images)).mean(dim=(2, 3)))
        if self.softmax:
            return torch.softmax(logits, 1)
        return torch.sigmoid(logits)


def logits_of(network: Scripted) -> Tensor:
    return network.fc(torch.relu(network.conv(IMAGES)).mean(dim=(2, 3))).detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_programs(form: str, softmax: bool, tmp_path: Path) -> None:
    network = Scripted(softmax).eval()
    path = save_program(network, IMAGES[:1] if form == "export" else IMAGES[:2], form, tmp_path)
    kind = "export" if form.startswith("export") else "torchscript"
    model = load_model(ModelSpec(name="n", source=f"{kind}:{path.name}", folder=tmp_path, patch_px=32).trusting())
    assert torch.allclose(model.module(IMAGES), logits_of(network), atol=1e-5)
    assert model.activation == ("softmax" if softmax else "sigmoid")
    examine(model, Request(batch_size=4))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("softmax", [True, False])
def test_a_live_script(softmax: bool) -> None:
    network = Scripted(softmax).eval().requires_grad_(False)
    model = model_of(torch.jit.script(network), name="n", patch_px=32)
    assert torch.allclose(model.module(IMAGES), logits_of(network), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*TorchScript:UserWarning")
@pytest.mark.parametrize("end", [nn.Softmax(1), nn.Sigmoid()])
def test_an_end_of_torchscript_in_an_ordinary_network(end: nn.Module) -> None:
    network = Ending(torch.jit.script(end)).eval()
    model = model_of(network, name="n", patch_px=32)
    assert torch.allclose(model.module(IMAGES), expected_logits(""), atol=1e-5)
    examine(model, Request(batch_size=4))


MIXTURES: dict[str, End] = {
    "ensemble of softmaxes": lambda z: (z.softmax(1) + z.flip(1).softmax(1)) / 2,
    "ensemble of sigmoids": lambda z: torch.stack([torch.sigmoid(z), torch.sigmoid(2 * z)]).mean(0),
    "temperatures": lambda z: 0.3 * z.softmax(1) + 0.7 * (z / 5).softmax(1),
    "label smoothing": lambda z: 0.9 * z.softmax(1) + 0.1 / z.shape[1],
    "by hand": lambda z: z.exp() / z.exp().sum(1, keepdim=True),
    "both classes of a sigmoid": lambda z: torch.cat([1 - torch.sigmoid(z[:, :1]), torch.sigmoid(z[:, :1])], 1),
    "one class of a softmax": lambda z: z.softmax(1)[:, 1],
    "hard": lambda z: F.hardsigmoid(z),
    "clamped": lambda z: (z / 6 + 0.5).clamp(0, 1),
    "tanh": lambda z: (torch.tanh(z) + 1) / 2,
}


@pytest.mark.parametrize("name", list(MIXTURES))
def test_probabilities_of_which_no_logits_can_be_told_are_refused(name: str) -> None:
    with pytest.raises(
        ModelError, match=r"returns probabilities .* return the values before it, or set 'activation: n"
    ):
        model_of(Ending(MIXTURES[name]).eval(), name="n", patch_px=32)
    with pytest.raises(ModelError, match="returns probabilities"):
        GradCAM(Ending(MIXTURES[name]).eval())(IMAGES)
    raw = model_of(Ending(MIXTURES[name]).eval(), name="n", patch_px=32, activation="none")
    assert raw.activation == "none"


HARMLESS: dict[str, Callable[[], nn.Module]] = {
    "small": lambda: Ending(lambda z: 0.5 + 0.01 * z),
    "positive": lambda: Ending(lambda z: z.abs() / 50),
    "zeros": lambda: Ending(lambda z: 0 * z),
    "constants that sum to 1": lambda: Ending(lambda z: 0 * z + torch.tensor([0.2, 0.3, 0.5])),
    "normalised": lambda: Ending(lambda z: 0.5 + 0.1 * F.layer_norm(z, z.shape[1:])),
    "negative": lambda: Ending(lambda z: -3 + 0.1 * F.layer_norm(z, z.shape[1:])),
    "normalised and gated": lambda: Ending(lambda z: 0.5 + 0.1 * F.layer_norm(z, z.shape[1:]) * torch.sigmoid(z)),
    "linear with a constant sum": lambda: Ending(lambda z: z - z.mean(1, keepdim=True) + 1 / 3),
    "one": lambda: Ending(lambda z: 0.4 + z[:, :1] / 1000),
    "gated": Gated,
}


@pytest.mark.parametrize("name", list(HARMLESS))
def test_logits_that_happen_to_lie_between_0_and_1_are_logits(name: str) -> None:
    network = HARMLESS[name]().eval()
    classes = network(IMAGES).shape[1]
    activation: Any = {"activation": "sigmoid"} if classes == 1 else {}
    model = model_of(network, name="n", patch_px=32, **activation)
    assert torch.equal(model.module(IMAGES), network(IMAGES))
    assert model.notes == ()


def test_a_regression_is_left_alone() -> None:
    network = Ending(lambda z: torch.sigmoid(z[:, :1])).eval()
    model = model_of(network, name="n", patch_px=32, activation="none")
    assert torch.equal(model.module(IMAGES), network(IMAGES))


@pytest.mark.parametrize(
    ("end", "declared", "words"),
    [
        (nn.Softmax(1), "sigmoid", "ends in softmax, but 'activation: sigmoid' is declared"),
        (nn.Sigmoid(), "softmax", "ends in sigmoid, but 'activation: softmax' is declared"),
    ],
)
def test_a_contradiction_is_refused(end: nn.Module, declared: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        model_of(Ending(end).eval(), name="n", patch_px=32, activation=declared)


@pytest.mark.parametrize(("end", "declared"), [(nn.Softmax(1), "softmax"), (nn.Sigmoid(), "sigmoid")])
def test_what_is_declared_rightly_is_taken(end: nn.Module, declared: Any) -> None:
    model = model_of(Ending(end).eval(), name="n", patch_px=32, activation=declared)
    assert torch.allclose(model.module(IMAGES), expected_logits(""), atol=1e-5)
    assert model.activation == declared


def test_the_softmax_of_one_output_is_refused() -> None:
    with pytest.raises(ModelError, match="the softmax of a single output is always 1"):
        model_of(Ending(nn.Softmax(1), 1).eval(), name="n", patch_px=32)


def test_digests_of_other_networks_stay_and_those_with_an_end_differ() -> None:
    plain = model_of(Ending(None).eval(), name="n", patch_px=32)
    assert type(plain.module) is Ending
    digests = {
        model_of(Ending(end).eval(), name="n", patch_px=32).digest for end in (None, nn.Softmax(1), nn.Sigmoid())
    }
    assert len(digests) == 3


def softmax_net() -> nn.Module:
    return Ending(nn.Softmax(1), 2)


def sigmoid_net() -> nn.Module:
    return Ending(nn.Sigmoid(), 1)


def plain_net() -> nn.Module:
    return Ending(None, 2)


@pytest.mark.parametrize("name", ["softmax_net", "sigmoid_net"])
def test_a_run_reports_each_probability_once(name: str, tmp_path: Path) -> None:
    slide = tmp_path / "a.tif"
    write_marker_slide(slide, 256, 256, mpp=0.25, markers=[(128, 128)], marker_px=64)
    one = name == "sigmoid_net"
    values = toy_values(name, source=f"{__name__}:{name}", layer="net.features", classes=["b"] if one else ["a", "b"])
    explain(slide, ModelSpec(**values), tmp_path / "out", trust_code=True, **SMALL)
    result = open_result(tmp_path / "out")
    table = result["a.tif"].patches
    names = ["b"] if one else ["a", "b"]
    logits = table[[f"logit_{c}" for c in names]].to_numpy(np.float32)
    found = table[[f"probability_{c}" for c in names]].to_numpy(np.float32)
    assert np.allclose(found, probabilities(logits, "sigmoid" if one else "softmax"), atol=1e-6)
    (note,) = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text(encoding="utf-8"))["model"]["notes"]
    assert "its outputs are the probabilities" in note
    assert note in (tmp_path / "out" / "run.html").read_text(encoding="utf-8")
    assert any(note in path.read_text(encoding="utf-8") for path in (tmp_path / "out" / "log").glob("*.jsonl"))
    assert rows_of(tmp_path / "out")["a.tif"]["status"] == "ok"


def test_an_audit_is_that_of_the_network_without_its_end() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    found, expected = (
        audit_images(rgb, model_of(Ending(end, 2).eval(), name="n", patch_px=32, mpp=0.5, layer="net.features"), only=o)
        for end in (nn.Softmax(1), None)
        for o in [["saturation", "sanity"]]
    )
    first, second = (
        np.array([np.nan if row.value is None else row.value for row in each.estimates], float)
        for each in (found, expected)
    )
    assert np.allclose(first, second, rtol=1e-3, atol=1e-3, equal_nan=True)
