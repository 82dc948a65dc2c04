"""The recipes run as their own documentation says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from tests.synthetic import write_marker_slide
from wsi_gradcam.mil.aggregators import load_aggregator
from wsi_gradcam.mil.spec import read_slide_model
from wsi_gradcam.models.load import load_model

ROOT = Path(__file__).parents[1]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, check=False)


def test_local_pipeline_explains_and_validates_a_folder(tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    write_marker_slide(slides / "a.tiff", 512, 512, mpp=0.5, markers=[], marker_px=16)
    ended = run(
        "pipelines/local.py",
        slides,
        "--model",
        "ihc-dab",
        "--target",
        "positive",
        "--out",
        tmp_path / "out",
        "--workers",
        "1",
    )
    assert ended.returncode == 0, ended.stderr
    assert "a.tiff: ok" in ended.stdout


def test_training_writes_a_model_that_loads_and_a_card(tmp_path: Path) -> None:
    ended = run("pipelines/train_demo.py", "ihc-dab", "--steps", "2", "--out", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert load_model(str(tmp_path / "ihc-dab.yaml")).classes == ("negative", "positive")
    assert "AUC" in (tmp_path / "ihc-dab.md").read_text(encoding="utf-8")


def write_crops(folder: Path) -> Path:
    """Crops whose right half is of larger and darker things, which their masks say."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(3):
        random = np.random.default_rng(number)
        fine, coarse = random.normal(size=(128, 96, 3)), random.normal(size=(16, 12, 3)).repeat(8, 0).repeat(8, 1)
        rgb = np.clip(np.hstack([190 + 15 * fine, 140 + 40 * coarse]), 0, 255).astype(np.uint8)
        mask = np.hstack([np.zeros((128, 96), np.uint8), np.full((128, 96), 255, np.uint8)])
        Image.fromarray(rgb).save(folder / "images" / f"p_r{number}c0.png")
        Image.fromarray(mask).save(folder / "masks" / f"p_r{number}c0.png")
    return folder


TRAINED_AGAIN = """
import sys
from pathlib import Path
sys.path.insert(0, "pipelines")
import torch
import train_mil as mil
torch.set_num_threads(1)
network = mil.encoder()
crops = [crop for crop in mil.read_crops(Path(sys.argv[1])) if crop.name != "p_r2c0"]
pools = {crop.name: mil.encode_windows(network, crop, mil.QUICK, mil.SEED) for crop in crops}
mil.write_model(Path(sys.argv[2]), network, crops, pools, mil.QUICK, mil.SEED)
"""


def test_a_slide_level_model_is_trained_and_judged_on_what_it_never_saw(tmp_path: Path) -> None:
    """The model file loads, the card says how the model did, and training again gives the same weights."""
    crops, out = write_crops(tmp_path / "crops"), tmp_path / "out"
    given: list[str | Path] = ["--data", crops, "--leave-out", "p_r2c0", "--quick", "--threads", "1", "--out", out]
    ended = run("pipelines/train_mil.py", *given)
    assert ended.returncode == 0, ended.stderr
    ended = run("-c", TRAINED_AGAIN, crops, tmp_path / "again")
    assert ended.returncode == 0, ended.stderr
    again = (tmp_path / "again" / "aggregator.safetensors").read_bytes()
    assert again == (out / "aggregator.safetensors").read_bytes()
    spec = read_slide_model(out / "tumour-mil.yaml")
    assert load_aggregator(spec).network.feature_dim == 1280
    assert spec.provenance["crops"] == ["p_r0c0", "p_r1c0"]
    (judged,) = json.loads((out / "tumour-mil.json").read_text(encoding="utf-8"))
    assert [crop["name"] for crop in judged["crops"]] == ["p_r2c0"]
    assert [label for label, _ in judged["slides"]] == [False, True, False, True]
    assert judged["crops"][0]["maps"]["colour alone"] > 0.9
    card = (out / "tumour-mil.md").read_text(encoding="utf-8")
    assert "held-out crops, which were not used for training. The model was trained on other crops of p." in card
    assert (out / "judged" / "p_r2c0" / "results" / "slides.csv").is_file()


def test_training_says_what_is_wrong_with_crops(tmp_path: Path) -> None:
    crops = write_crops(tmp_path / "crops")
    (crops / "masks" / "p_r1c0.png").unlink()
    ended = run("pipelines/train_mil.py", "--data", crops, "--quick", "--out", tmp_path / "out")
    assert ended.returncode == 1
    assert "p_r1c0.png: has no mask; expected a picture named p_r1c0" in ended.stderr


def test_example_configuration_has_only_keys_that_exist() -> None:
    from wsi_gradcam.run.settings import make_settings

    values = yaml.safe_load((ROOT / "configs/example.yaml").read_text(encoding="utf-8"))
    for key in ("slide", "model", "out"):
        assert values.pop(key)
    assert make_settings(**values).overlap == 0.5
