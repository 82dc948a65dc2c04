"""The recipes run as their own documentation says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from tests.synthetic import write_marker_slide
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


def test_example_configuration_has_only_keys_that_exist() -> None:
    from wsi_gradcam.run.settings import make_settings

    values = yaml.safe_load((ROOT / "configs/example.yaml").read_text(encoding="utf-8"))
    for key in ("slide", "model", "out"):
        assert values.pop(key)
    assert make_settings(**values).overlap == 0.5
