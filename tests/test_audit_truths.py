"""Every verdict is right where the truth is known: with one seed here, with fifty in the proofs."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import wsi_gradcam
from tests.planted import as_model, marker_only, patches
from tests.planted_bags import BagTruth
from tests.planted_models import Annotation, Facade
from tests.planted_rates import EVERY, Finding, main
from tests.planted_truths import TRUTHS, Truth
from wsi_gradcam import GradCAM

by_name = pytest.mark.parametrize("truth", EVERY, ids=lambda truth: truth.name)


@by_name
def test_truths_are_told(truth: Truth | BagTruth) -> None:
    assert truth.judge(1) in truth.expected


@pytest.mark.slow
def test_truths_are_told_with_fifty_fresh_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    """No measure or threshold was chosen with these seeds in sight."""
    main(["--seeds", "50", "--first", "1000", "--jobs", "2", "--json"])
    rates = json.loads(capsys.readouterr().out)["rates"]
    assert len(rates) == len(EVERY)
    assert not [rate for rate in rates if rate["right"] < 48 or rate["wrong"] > 2]


def test_rates_are_printed_as_a_table_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "2", "--first", "5", "--only", "cliff"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "| locality, gradcam | cliff ahead | fails | 0 / 0 / 2 | 100% | 0% |"
    assert main(["--seeds", "1", "--only", "straight on", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["first"], found["seeds"]) == (1000, 1)
    assert found["rates"][0]["outcomes"] == {"holds": 1, "unclear": 0, "fails": 0}


def test_what_is_found_is_kept_and_not_judged_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rates.jsonl"
    asked = ["--first", "3", "--only", "cliff", "--results", str(file)]
    main([*asked, "--seeds", "1"])
    kept = Finding(**json.loads(file.read_text()))
    assert (kept.seed, kept.outcome) == (3, "fails")
    file.write_text(file.read_text().replace("fails", "holds"))
    assert main([*asked, "--seeds", "2"]) == 1
    assert "| 1 / 0 / 1 | 50% | 50% |" in capsys.readouterr().out
    assert len(file.read_text().splitlines()) == 2


def test_gradcam_shows_what_is_planted_and_the_answer_does_not_hang_on_it() -> None:
    sample = patches(8, 1, "tumour")
    planted, network = Annotation(), marker_only()
    model = as_model(Facade(planted, network).eval())
    images = model.prepare(torch.from_numpy(sample.rgb))
    found = GradCAM(model)(images, targets=["tumour"])
    torch.testing.assert_close(found.logits, network(images))
    shown, maps = planted(images)[:, 0].flatten(1), found.cams[:, 0].flatten(1)
    assert (maps[1::2].argmax(dim=1) == shown[1::2].argmax(dim=1)).all()
    assert np.corrcoef(maps[1], shown[1])[0, 1] > 0.9


def test_truths_have_names_of_their_own() -> None:
    assert len({truth.name for truth in EVERY}) == len(EVERY) == len(TRUTHS) + 16 == 50


@pytest.mark.parametrize("module", ["planted", "planted_bags", "planted_models", "planted_truths", "planted_rates"])
def test_truths_are_judged_through_public_names_alone(module: str) -> None:
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    for node in tree.body:  # those for types alone are in a block of their own
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("wsi_gradcam"):
            assert node.module == "wsi_gradcam"
            assert {name.name for name in node.names} <= set(wsi_gradcam.__all__)
        assert not isinstance(node, ast.Import) or not any("wsi_gradcam" in name.name for name in node.names)
