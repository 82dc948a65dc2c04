"""A machine chooses alike twice, and a cache that is damaged, foreign or read-only does no harm."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.runs import toy_spec
from wsi_gradcam.cam import explainer as room
from wsi_gradcam.cam.auto import cache_file, choice_key, read_choice, store_choice
from wsi_gradcam.cam.explainer import Request, examine
from wsi_gradcam.cam.facts import Choice, Trial
from wsi_gradcam.models.load import load_model

CPU = torch.device("cpu")
CHOICE = Choice("openvino", "float16", (Trial("eager", "float32", 12.5, 1.0, 1.0, 0.0), Trial("compile", "bfloat16")))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_file()


def test_a_choice_is_recalled_as_it_was_and_others_stay() -> None:
    store_choice("a", CHOICE)
    store_choice("b", Choice("eager", "float32"))
    assert (read_choice("a"), read_choice("b"), read_choice("c")) == (CHOICE, Choice("eager", "float32"), None)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b'{"a": 3}', b'{"a": {"engine": "eager"}}'])
def test_a_damaged_cache_is_as_good_as_none_and_is_mended(own_cache: Path, content: bytes) -> None:
    own_cache.parent.mkdir(parents=True)
    own_cache.write_bytes(content)
    assert read_choice("a") is None
    store_choice("a", CHOICE)
    assert read_choice("a") == CHOICE


def test_a_folder_that_cannot_be_made_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    store_choice("a", CHOICE)
    assert read_choice("a") is None


def test_the_key_tells_apart_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice_key(CPU, "digest", 32) == choice_key(CPU, "digest", 32)
    assert len({choice_key(CPU, "digest", 32), choice_key(CPU, "digest", 16), choice_key(CPU, "other", 32)}) == 3


def test_a_second_run_chooses_as_the_first_without_trials(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the machine would now seem faster with another engine."""
    model = load_model(toy_spec("pooled_linear"))
    request = Request(engine="auto", precision="auto", batch_size=4)
    first = examine(model, request).facts.choice
    assert {"engine", "precision", "trials"} <= json.loads(own_cache.read_text()).popitem()[1].keys()

    def never(*arguments: object) -> None:
        raise AssertionError("tried again")

    monkeypatch.setattr(room, "choose", never)
    assert examine(model, request).facts.choice == first


@pytest.mark.parametrize("alike", [True, False])
def test_a_low_precision_is_compared_anew(monkeypatch: pytest.MonkeyPatch, alike: bool) -> None:
    model = load_model(toy_spec("pooled_linear"))
    request = Request(engine="eager", precision="auto", batch_size=4)
    key = choice_key(CPU, model.digest, ["features"], 4, "eager", "auto")
    store_choice(key, Choice("eager", "bfloat16"))
    monkeypatch.setattr("wsi_gradcam.cam.auto.Fidelity.is_enough", alike)
    assert (examine(model, request).facts.choice == Choice("eager", "bfloat16")) is alike


def test_an_engine_that_is_gone_is_chosen_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(toy_spec("pooled_linear"))
    key = choice_key(CPU, model.digest, ["features"], 4, "auto", "auto")
    store_choice(key, Choice("gone", "float32"))
    assert examine(model, Request(engine="auto", precision="auto", batch_size=4)).facts.choice.engine != "gone"
    assert os.environ["XDG_CACHE_HOME"]
