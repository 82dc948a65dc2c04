"""Published state dicts become the networks that they are of, and all others are refused by name."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.bags import MODELS, D, K, State, V, bag, clam, dsmil, lab_abmil, loaded, seeded, transmil, write_model, xmil
from wsi_gradcam.cam.targets import Target
from wsi_gradcam.errors import ConfigError, ModelError
from wsi_gradcam.mil.aggregators import LoadedAggregator, load_aggregator
from wsi_gradcam.mil.attribution import explain_bag
from wsi_gradcam.mil.networks import AttentionPool, Dsmil
from wsi_gradcam.mil.spec import is_slide_model, read_slide_model, slide_probabilities

REAL = Path(__file__).parents[2] / "shared" / "data" / "mil"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is absent")


def load(folder: Path, kind: str, state: State, **more: str) -> LoadedAggregator:
    return load_aggregator(read_slide_model(write_model(folder, kind, state, **more)))


def written(folder: Path, text: str) -> Path:
    (folder / "slide.yaml").write_text(text, encoding="utf-8")
    return folder / "slide.yaml"


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_loaded_with_its_sizes(name: str, tmp_path: Path) -> None:
    network = loaded(tmp_path, name).network
    _, state, answer = MODELS[name]
    assert (network.feature_dim, network.class_count) == (D, K)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    x = torch.from_numpy(bag(9)).float()
    torch.testing.assert_close(network(x).logits, answer(state, x), rtol=1e-4, atol=1e-5)


@real
def test_a_published_attention_model_with_numpy_numbers_beside_its_weights_is_read(tmp_path: Path) -> None:
    path = REAL / "xmil_camelyon16_attnmil.pt"
    model = load_aggregator(read_slide_model(written(tmp_path, f"aggregator: {{source: abmil, weights: '{path}'}}")))
    assert (model.network.feature_dim, model.network.class_count) == (768, 2)
    assert model.notes == ("the weights are 'model_state_dict' in xmil_camelyon16_attnmil.pt",)
    found = explain_bag(model.network, bag(50, width=768).astype(np.float16), [Target("1", 1)], ["lrp"])
    assert found.relevance["lrp"].sum() == pytest.approx(found.logits[1], rel=1e-3)


@real
def test_a_published_dsmil_is_read(tmp_path: Path) -> None:
    text = f"aggregator: {{source: dsmil, weights: '{REAL / 'dsmil_c16_aggregator.pth'}'}}\nactivation: sigmoid"
    network = load_aggregator(read_slide_model(written(tmp_path, text))).network
    assert isinstance(network, Dsmil)
    assert (network.feature_dim, network.class_count, network.tanh, len(network.value.layers)) == (512, 1, True, 0)


def test_weights_are_found_behind_a_prefix_and_what_is_beside_them_is_told(tmp_path: Path) -> None:
    state = {f"net.aggregator.{name}": value for name, value in xmil(seeded()).items()}
    model = load(tmp_path, "abmil", {**state, "encoder_head.weight": torch.ones(1, 1)})
    assert model.notes == ("the weights are those with the prefix 'net.aggregator.'", "not used: encoder_head.weight")
    clam_notes = load(tmp_path, "clam", clam(seeded(), 1)).notes
    assert clam_notes == (
        "not used: instance_classifiers.0.weight, instance_classifiers.0.bias, "
        "instance_classifiers.1.weight and 4 more",
    )


def changed(state: State, **changes: Tensor | None) -> State:
    merged = {**state, **{name.replace("__", "."): value for name, value in changes.items()}}
    return {name: value for name, value in merged.items() if value is not None}


@pytest.mark.parametrize(
    ("kind", "state", "told"),
    [
        (
            "abmil",
            changed(xmil(seeded()), attention__0__weight=torch.ones(6, 9)),
            r"attention.0.weight has shape \(6, 9\), expected \(\*, 8\)",
        ),
        (
            "abmil",
            changed(xmil(seeded()), attention__2__weight=torch.ones(1, 5)),
            r"attention.2.weight has shape \(1, 5\), expected \(\*, 6\)",
        ),
        (
            "abmil",
            changed(xmil(seeded()), classifier__weight=torch.ones(3, 5)),
            r"classifier.weight has shape \(3, 5\), expected \(\*, 8\)",
        ),
        (
            "abmil",
            changed(xmil(seeded()), classifier__bias=torch.ones(2)),
            r"classifier.bias has shape \(2,\), expected \(3,\)",
        ),
        (
            "abmil",
            changed(xmil(seeded()), norm__weight=torch.ones(8)),
            r"norm.weight \(8,\) does not belong to such a network",
        ),
        ("abmil", changed(xmil(seeded()), classifier__weight=None), "classifier has no real-valued weights"),
        ("abmil", transmil(seeded()), "does not belong to such a network"),
        ("abmil", {"a.weight": torch.ones(2, 2)}, r"a.weight \(2, 2\) does not belong"),
        ("abmil", {"classifier.weight": torch.ones(2, 2)}, "no layer that could be gate_a or score; it has classifier"),
        (
            "clam",
            changed(clam(seeded(), K), classifiers__2__weight=None, classifiers__2__bias=None),
            "2 classifiers .* attention has 3 branches",
        ),
        (
            "clam",
            changed(clam(seeded(), K), classifiers__1__weight=torch.ones(1, 5)),
            r"classifiers.1.weight has shape \(1, 5\), expected \(1, 8\)",
        ),
        (
            "clam",
            changed(
                clam(seeded(), 1),
                attention_net__3__attention_b__0__weight=torch.ones(5, 8),
                attention_net__3__attention_b__0__bias=torch.ones(5),
            ),
            "the gate 5",
        ),
        (
            "dsmil",
            changed(
                dsmil(seeded()),
                b_classifier__q__2__weight=None,
                b_classifier__q__2__bias=None,
                b_classifier__v__1__weight=torch.ones(D, D),
            ),
            "b_classifier.v.1: DSMIL's code of 2021 puts no activation after it.*value_activation",
        ),
        (
            "dsmil",
            changed(dsmil(seeded()), b_classifier__fcc__weight=torch.ones(2, 2, D)),
            r"b_classifier.fcc.weight has shape \(2, 2, 12\), expected \(\*, 36\)",
        ),
        (
            "transmil",
            changed(transmil(seeded()), layer2__attn__to_qkv__weight=torch.ones(20, V)),
            r"layer2.attn.to_qkv.weight has shape \(20, 8\), expected \(24, 8\)",
        ),
        (
            "transmil",
            changed(transmil(seeded()), layer1__attn__res_conv__weight=None, layer2__attn__res_conv__weight=None),
            "add 'heads: 8'",
        ),
        (
            "transmil",
            changed(transmil(seeded()), pos_layer__proj1__weight=torch.ones(V, 2, 5, 5)),
            r"pos_layer.proj1.weight has shape \(8, 2, 5, 5\), expected \(8, 1, \*, \*\)",
        ),
        (
            "transmil",
            changed(transmil(seeded()), layer2__norm__weight=torch.ones(3)),
            r"layer2.norm.weight has shape \(3,\), expected \(8,\)",
        ),
        (
            "abmil",
            changed(xmil(seeded()), classifier__weight=torch.ones(1, 1).expand(1 << 20, 1 << 20)),
            "numbers in 1?[0-9]+ tensors, more than any aggregator has",
        ),
        (
            "abmil",
            changed(xmil(seeded()), classifier__weight=torch.full((3, 8), torch.nan)),
            "24 of 24 values of .* are NaN",
        ),
        (
            "abmil",
            changed(xmil(seeded()), classifier__weight=torch.ones(3, 8, dtype=torch.int64)),
            "classifier has no real-valued weights",
        ),
    ],
)
def test_what_does_not_fit_is_told_by_its_name(kind: str, state: State, told: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=told) as refused:
        load(tmp_path, kind, state)
    assert "\n" not in str(refused.value)


def test_what_weights_do_not_tell_is_said_in_the_model_file(tmp_path: Path) -> None:
    state = changed(
        dsmil(seeded(), value=True),
        b_classifier__q__0__weight=None,
        b_classifier__q__0__bias=None,
        b_classifier__q__2__weight=None,
        b_classifier__q__2__bias=None,
        b_classifier__q__weight=torch.ones(5, D),
    )
    torch.save(state, tmp_path / "weights.pt")
    for word, relu in {"relu": True, "none": False}.items():
        text = f"aggregator: {{source: dsmil, weights: weights.pt, value_activation: {word}}}"
        network = load_aggregator(read_slide_model(written(tmp_path, text))).network
        assert isinstance(network, Dsmil)
        assert network.value.ends == relu
        assert not network.tanh


class Counting(nn.Module):
    """Not to be unpickled."""


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    torch.save({"model": xmil(seeded()), "args": Counting()}, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match="objects in pickles are never loaded"):
        load_aggregator(read_slide_model(written(tmp_path, "aggregator: {source: abmil, weights: weights.pt}")))
    (tmp_path / "weights.pt").write_bytes(pickle.dumps({"model": np.ones(3)}))
    with pytest.raises(ModelError, match=r"weights\.pt"):
        load_aggregator(read_slide_model(tmp_path / "slide.yaml"))


def test_numpy_numbers_beside_the_weights_are_read_for_slide_models_alone(tmp_path: Path) -> None:
    numbers = {"auc": np.float64(0.9), "epoch": np.int64(7), "good": np.bool_(True)}
    torch.save({"model_state_dict": xmil(seeded()), **numbers}, tmp_path / "weights.pt")
    load_aggregator(read_slide_model(written(tmp_path, "aggregator: {source: abmil, weights: weights.pt}")))
    with pytest.raises(Exception, match="scalar"):
        torch.load(tmp_path / "weights.pt", weights_only=True)


def test_lightning_checkpoints_are_refused_with_the_lines_that_convert_them(tmp_path: Path) -> None:
    holds = {"state_dict": xmil(seeded()), "pytorch-lightning_version": "2.0.0", "hyper_parameters": {"lr": 1}}
    torch.save(holds, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=r"Lightning checkpoint.*save_file\(") as refused:
        load_aggregator(read_slide_model(written(tmp_path, "aggregator: {source: abmil, weights: weights.pt}")))
    code = str(refused.value).split("of their own: ")[1].replace("in.ckpt", str(tmp_path / "weights.pt"))
    exec(code.replace("weights.safetensors", str(tmp_path / "weights.safetensors")))  # the lines do what they promise
    load_aggregator(read_slide_model(written(tmp_path, "aggregator: {source: abmil, weights: weights.safetensors}")))


def test_several_weights_that_fit_are_refused_and_the_same_twice_are_not(tmp_path: Path) -> None:
    text = "aggregator: {source: abmil, weights: weights.pt}"
    torch.save({"model": xmil(seeded()), "other": xmil(seeded())}, tmp_path / "weights.pt")
    load_aggregator(read_slide_model(written(tmp_path, text)))
    torch.save({"model": xmil(seeded()), "other": xmil(seeded(1))}, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match="has several fitting sets of weights, model and other"):
        load_aggregator(read_slide_model(tmp_path / "slide.yaml"))


def test_digests_are_of_what_changes_answers(tmp_path: Path) -> None:
    first = load(tmp_path, "abmil", xmil(seeded()))
    assert first.digest == load(tmp_path, "abmil", xmil(seeded())).digest
    assert first.digest != load(tmp_path, "abmil", xmil(seeded(1))).digest
    assert first.digest != load(tmp_path, "abmil", xmil(seeded()), activation="sigmoid").digest
    assert first.digest != load(tmp_path, "abmil", xmil(seeded()), classes="[a, b, c]").digest


def test_files_are_compared_before_anything_is_read(tmp_path: Path) -> None:
    torch.save(xmil(seeded()), tmp_path / "weights.pt")
    wrong = written(tmp_path, f"aggregator: {{source: abmil, weights: weights.pt, sha256: '{'0' * 64}'}}")
    with pytest.raises(ModelError, match=r"has sha256 .*, expected 000"):
        load_aggregator(read_slide_model(wrong))
    with pytest.raises(ModelError, match=r"no weights file .*none.pt; paths are relative to the model file"):
        load_aggregator(read_slide_model(written(tmp_path, "aggregator: {source: abmil, weights: none.pt}")))
    with pytest.raises(ModelError, match="abmil needs a state dict; give it with 'weights:'"):
        load_aggregator(read_slide_model(written(tmp_path, "aggregator: abmil")))


@pytest.mark.parametrize(
    ("kind", "make"), [("abmil", lab_abmil), ("transmil", lambda random: transmil(random, lab=True))]
)
def test_folders_of_mil_lab_are_read(kind: str, make: Callable[[torch.Generator], State], tmp_path: Path) -> None:
    folder = tmp_path / "lab"
    folder.mkdir()
    save_file(make(seeded()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "num_heads": 2, "in_dim": D}), encoding="utf-8")
    network = load_aggregator(read_slide_model(written(tmp_path, "aggregator: mil-lab:lab"))).network
    assert (network.feature_dim, network.class_count) == (D, K)
    (folder / "config.json").write_text('{"model_type": "wikg"}', encoding="utf-8")
    with pytest.raises(ModelError, match="model_type wikg is not read; expected abmil, clam, dsmil, transmil"):
        load_aggregator(read_slide_model(tmp_path / "slide.yaml"))
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match="no weights file"):
        load_aggregator(read_slide_model(tmp_path / "slide.yaml"))


class Mean(nn.Module):
    """A bag's mean through a linear layer, as logits and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Linear(D, K)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(dim=0), self.top(x).mean(dim=0, keepdim=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # that torch.jit is deprecated
def test_programs_need_permission_and_say_which_output_is_meant(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(Mean()), tmp_path / "mean.pt")
    spec = read_slide_model(written(tmp_path, "aggregator: torchscript:mean.pt"))
    with pytest.raises(ModelError, match="loading it runs code that it contains"):
        load_aggregator(spec)
    with pytest.raises(ModelError, match="choose the logits with 'output:'"):
        load_aggregator(spec.trusting())
    spec = read_slide_model(written(tmp_path, "aggregator: {source: 'torchscript:mean.pt', output: 1}")).trusting()
    network = load_aggregator(spec).network
    assert (network.feature_dim, network.class_count) == (D, K)
    found = explain_bag(network, bag(9), [Target("1", 1)], ["gradient_x_input", "integrated_gradients", "one_removed"])
    expected = found.relevance["gradient_x_input"]
    np.testing.assert_allclose(found.relevance["integrated_gradients"], expected, rtol=1e-4, atol=1e-6)
    for method, told in {
        "lrp": "rules are known for",
        "attention": "so its attention is not known",
        "shapley": "not additive",
    }.items():
        with pytest.raises(ConfigError, match=told):
            explain_bag(network, bag(9), [Target("1", 1)], [method])


def test_a_function_may_return_a_network_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import torch\n"
        "from wsi_gradcam.mil.networks import AttentionPool, Mlp\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    a, c, top = torch.nn.Linear(5, 4), torch.nn.Linear(4, 1), torch.nn.Linear(5, 2)\n"
        "    return AttentionPool(Mlp([], True), a, None, c, Mlp([top], False))\n"
    )
    (tmp_path / "bag_network.py").write_text(code, encoding="utf-8")
    spec = read_slide_model(written(tmp_path, "aggregator: bag_network:build"))
    with pytest.raises(ModelError, match="loading it runs code"):
        load_aggregator(spec)
    network = load_aggregator(spec.trusting()).network
    assert isinstance(network, AttentionPool)
    assert network.feature_dim == 5


def test_the_model_file_is_read_with_its_encoder(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "encoder:\n  source: timm:resnet18\n  patch_px: 224\n  mpp: 0.5\n"
        "aggregator:\n  source: clam\n  weights: clam.pt\n"
        "classes: [normal, tumour]\nactivation: hazard\nlicense: MIT\n",
    )
    spec = read_slide_model(path)
    assert is_slide_model(path)
    assert spec.encoder is not None
    assert (spec.name, spec.encoder.source, spec.encoder.mpp) == ("slide", "timm:resnet18", 0.5)
    assert (spec.aggregator.kind, spec.aggregator.weights, spec.classes) == ("clam", "clam.pt", ("normal", "tumour"))
    (tmp_path / "patch.yaml").write_text("source: timm:resnet18\nmpp: 0.5\n", encoding="utf-8")
    spec = read_slide_model(written(tmp_path, "encoder: patch.yaml\naggregator: {source: abmil, weights: a.pt}"))
    assert spec.encoder is not None
    assert spec.encoder.name == "patch"
    assert not is_slide_model(tmp_path / "patch.yaml")
    assert not is_slide_model(tmp_path / "none.yaml")
    assert read_slide_model(written(tmp_path, "aggregator: {source: abmil, weights: a.pt}")).encoder is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("agregator: abmil", "no 'aggregator:', so this is not a slide-level model"),
        ("aggregator: abmil\nclases: [a]", "clases: unknown key, check the spelling: did you mean classes?"),
        ("aggregator: {source: abmil, weigths: a.pt}", "aggregator: weigths: unknown key.*did you mean weights?"),
        ("aggregator: abmill", "expected abmil, .*did you mean abmil?"),
        ("aggregator: 'clam:a.pt'", "clam takes nothing after a colon"),
        ("aggregator: 7", "aggregator: expected keys"),
        ("aggregator: abmil\nencoder: {sorce: timm:resnet18}", "encoder: .*sorce: unknown key"),
        ("aggregator: abmil\nencoder: 7", "encoder: expected keys"),
        ("aggregator: abmil\nfolder: /", "folder: unknown key"),
        ("aggregator: {source: abmil, folder: /}", "aggregator: expected keys"),
        ("aggregator: abmil\nclasses: [a, a]", "each one different"),
        ("aggregator: abmil\nclasses: [no, yes]", "YAML reads yes"),
        ("aggregator: abmil\nactivation: hazards", "activation: "),
        ("aggregator: {source: transmil, heads: 0}", "heads: "),
    ],
)
def test_mistakes_in_the_model_file_are_told_by_key(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=told):
        read_slide_model(written(tmp_path, text))


def test_classes_and_activation_fit_the_logits(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="2 classes are named, but it gives 3 logits"):
        load(tmp_path, "abmil", xmil(seeded()), classes="[a, b]")
    state = changed(xmil(seeded()), classifier__weight=torch.ones(1, V), classifier__bias=torch.ones(1))
    with pytest.raises(ModelError, match="the softmax of a single logit is always 1; add 'activation: sigmoid'"):
        load(tmp_path, "abmil", state)
    assert load(tmp_path, "abmil", state, activation="sigmoid").classes == ("0",)


def test_probabilities_of_slides() -> None:
    logits = np.array([0.0, np.log(3), -1000.0])
    np.testing.assert_allclose(slide_probabilities(logits, "softmax"), [0.25, 0.75, 0])
    np.testing.assert_allclose(slide_probabilities(logits, "sigmoid"), [0.5, 0.75, 0])
    np.testing.assert_allclose(slide_probabilities(logits, "hazard"), [0.5, 0.125, 0.125])
    np.testing.assert_array_equal(slide_probabilities(logits, "none"), logits)
