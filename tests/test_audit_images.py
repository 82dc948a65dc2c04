"""`audit_images`: planted truths through the whole audit, on plain patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import wsi_gradcam
from tests.planted import GLASS, SIDE_PX, marker_only, patches, trained, untrained
from wsi_gradcam import audit_images, model_of
from wsi_gradcam.audit.schema import Metrics
from wsi_gradcam.errors import ConfigError, ModelError, TargetError
from wsi_gradcam.models.load import Model

GROUPS = [f"slide {i % 12}" for i in range(48)]


def model(network: nn.Module) -> Model:
    return model_of(
        network, patch_px=SIDE_PX, mpp=0.5, classes=["other", "tumour"], mean=[0.5] * 3, std=[0.5] * 3, layer="features"
    )


def tumours(marked: str, seed: int = 7) -> Any:
    sample = patches(96, seed, marked)
    rows = sample.label == 1
    return sample.rgb[rows], sample.disc[rows], sample.marker[rows]


def outcome(metrics: Metrics, question: str, of: str) -> str:
    return next(v.outcome for v in metrics.verdicts if (v.question, v.of) == (question, of))


def test_a_model_that_looks_where_it_should(tmp_path: Path) -> None:
    rgb, disc, _ = tumours("none")
    page = tmp_path / "report.html"
    found = audit_images(
        rgb,
        model(trained(seed=3)),
        target="tumour",
        groups=GROUPS,
        annotated=disc,
        glass=GLASS,
        report=page,
        only=["plausibility", "faithfulness", "saturation"],
    )
    (quadrant,) = found.quadrants
    assert (quadrant.faithful, quadrant.plausible) == ("holds", "holds")
    assert outcome(found, "faithfulness", "gradcam") == "holds"
    assert found.run.questions == ["faithfulness", "saturation", "plausibility"]
    assert (found.sample.patches, found.sample.slides, found.sample.deep) == (48, 12, 48)
    text = page.read_text(encoding="utf-8")
    assert "looks where a pathologist would" in text
    assert "Slides of the sample" not in text
    assert "data:image/png" in text


def test_a_model_of_a_mark_is_faithful_and_implausible_and_told() -> None:
    rgb, disc, mark = tumours("tumour")
    asked = ["faithfulness", "shortcuts", "plausibility"]
    found = audit_images(
        rgb,
        model(marker_only()),
        target="tumour",
        groups=GROUPS,
        annotated=disc,
        regions={"stamp": mark},
        glass=GLASS,
        only=asked,
    )
    (quadrant,) = found.quadrants
    assert quadrant.plausible == "fails"
    assert outcome(found, "shortcuts", "stamp (given)") == "fails"
    assert outcome(found, "plausibility", "gradcam") == "fails"


def test_the_same_seed_gives_the_same_numbers_and_groups_need_not_be() -> None:
    rgb, _, _ = tumours("none")
    found = [audit_images(rgb[:20], model(untrained(1)), only=["locality", "stability"], seed=5) for _ in range(2)]
    assert found[0] == found[1]
    assert all(row.resampled in ("patch", "draw") for row in found[0].estimates if row.patches)
    assert found[0].run.target == "predicted"
    assert not [row for row in found[0].estimates if "shift" in row.what]
    assert not [row for row in found[0].not_tested if "overlap" in row.what]
    assert audit_images(rgb[:20], model(untrained(1)), only=["locality"], seed=6) != found[0]


def test_an_untrained_model_is_told() -> None:
    found = audit_images(patches(16, 2).rgb, model(untrained(0)), only=["sanity"])
    assert outcome(found, "sanity", "model") == "fails"


def test_several_methods() -> None:
    found = audit_images(patches(8, 2).rgb, model(untrained(0)), only=["saturation"], method="gradcam,hirescam")
    assert found.run.methods == ["gradcam", "hirescam"]
    assert {row.of for row in found.estimates} >= {"gradcam", "hirescam"}


def test_arguments_that_do_not_fit() -> None:
    rgb, disc, _ = tumours("none")
    known = model(untrained())
    for changes, error, message in (
        ({"rgb": rgb[:, :8]}, ConfigError, r"expected uint8 \('N', 32, 32, 3\)"),
        ({"rgb": rgb[:0]}, ConfigError, "expected uint8"),
        ({"groups": ["a"]}, ConfigError, "1 groups of 48 patches"),
        ({"annotated": disc, "target": "predicted"}, ConfigError, "give it as `target`"),
        ({"regions": {"fold": disc[:3]}}, ConfigError, "fold: bool "),
        ({"regions": {"fold": disc.astype(np.uint8)}}, ConfigError, "fold: uint8 "),
        ({"target": "liver"}, TargetError, "liver"),
        ({"only": ["truth"]}, ConfigError, "'truth' is not one of the audit's questions"),
        ({"method": "tarot"}, ConfigError, "tarot"),
        ({"model": "no-such-model"}, ModelError, "no such model"),
    ):
        given: dict[str, Any] = {"rgb": rgb, "model": known, "target": "tumour", **changes}
        with pytest.raises(error, match=message):
            audit_images(given.pop("rgb"), given.pop("model"), **given)


def test_it_is_public_and_loads_models_by_name() -> None:
    assert wsi_gradcam.audit_images is audit_images
    rgb = np.full((4, 64, 64, 3), 200, np.uint8)
    rgb += np.random.default_rng(0).integers(0, 40, rgb.shape).astype(np.uint8)
    threads = torch.get_num_threads()
    found = audit_images(rgb, "oral-tumour", only=["saturation"])
    assert found.run.model == "oral-tumour"
    assert torch.get_num_threads() == threads
