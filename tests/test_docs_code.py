"""Each block of Python in README and docs runs as it stands, on a slide of real tissue; what does not says why not.

Blocks of a page share their names, as a reader would type them one after the other. Names that a page leaves to its
reader (`network`, `rgb`, ...) are given here. A few words are replaced, so that pictures are small: `SMALLER`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.bags import K, bag, clam, seeded, write_model
from tests.house import ROOT
from wsi_gradcam import explain
from wsi_gradcam.demo.run import CROP_PX, read_crops
from wsi_gradcam.demo.slide import write_slide

PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Blocks that do not run here, by the page and a line that only they have.
NOT_RUN = {
    (
        "docs/slide_level.md",
        "slide.slide_probabilities",
    ): "it reads a run of slide-level models: tests/test_mil_runs.py",
}
SMALLER = (
    ("patch_px=224", "patch_px=32"),
    ("demo-output/oral-cancer", "results"),
    ("oral-cancer.tiff", "a.svs"),
    ("level=2, ", ""),  # the slide is too small to have one
)
SIDE = 32
SLOW = {"docs/auditing.md": pytest.mark.slow}  # whole audits; in CI tests/test_audit_images.py makes the same calls


def network() -> nn.Module:
    """A network whose weights are random, of two classes, for images of any size."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    return nn.Sequential(*layers).eval()


def patches(side: int, count: int = 8) -> Any:
    """Patches of real tissue, uint8 [count, side, side, 3]."""
    tissue, _ = read_crops()
    return np.stack([tissue[400:, 300 * i :][:side, :side] for i in range(count)])


def squares(first: int) -> Any:
    """A square in each of eight patches, bool [8, SIDE, SIDE]."""
    found = np.zeros((8, SIDE, SIDE), np.bool_)
    found[:, first : first + 8, first : first + 8] = True
    return found


IDS = [f"slide {number}" for number in range(8)]
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": lambda: {"network": network(), "images": torch.rand(4, 3, 64, 64)},
    "docs/models.md": lambda: {"network": network(), "patches": torch.from_numpy(patches(SIDE))},
    "docs/auditing.md": lambda: {
        "network": network(),
        "rgb": patches(SIDE),
        "slides": IDS,
        "masks": squares(8),
        "rulers": squares(20),
        "features": bag(30, 1).astype(np.float32),
        "others": bag(30, 2).astype(np.float32),
        "shares": np.linspace(0, 1, 30),
        "inked": np.arange(30) < 5,
    },
}


def blocks() -> Iterator[tuple[str, int, str]]:
    """The page, line and text of each block."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            yield page.relative_to(ROOT).as_posix(), text.count("\n", 0, found.start()) + 1, found[1]


BLOCKS = list(blocks())


def reason(page: str, code: str) -> str:
    """Why a block is not run; "" where it is."""
    return next((why for (where, line), why in NOT_RUN.items() if where == page and line in code), "")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `slides/a.svs`, 4.5 mm of glass with real tissue at the end, and `results/` that explain it."""
    folder = tmp_path_factory.mktemp("docs")
    level0 = np.full((18_432, 1_280, 3), 243, np.uint8)
    level0[11_000 : 11_000 + CROP_PX] = np.asarray(read_crops()[0])[:CROP_PX, :1280]
    (folder / "slides").mkdir()
    write_slide(folder / "slides" / "a.svs", level0, mpp=0.25)
    Image.fromarray(level0[11_000:11_400, :400]).save(folder / "tissue.png")
    outcome = explain(folder / "slides/", "oral-tumour", folder / "results/", target="tumour")
    assert not outcome.failed
    write_model(
        folder, "clam", clam(seeded(), 1), classes=f"[{', '.join(['other', 'tumour', *map(str, range(2, K))][:K])}]"
    )
    (folder / "slide.yaml").rename(folder / "slides.yaml")
    return folder


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=SLOW.get(page, ())) for page in sorted({page for page, _, _ in BLOCKS})]
)
def test_the_blocks_of_a_page_run_one_after_the_other(
    page: str, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(results)
    names: dict[str, Any] = {"__name__": "page", **GIVEN.get(page, dict)()}
    given = dict(names)
    for where, line, code in BLOCKS:
        if where != page or reason(page, code):
            continue
        for large, small in SMALLER:
            code = code.replace(large, small)
        if 'load_model("oral-tumour")' in code and page == "docs/auditing.md":
            given["rgb"] = patches(64)
        exec(compile(code, f"{page}:{line}", "exec"), names | given)


def test_what_does_not_run_is_there_and_has_a_reason() -> None:
    for (page, line), why in NOT_RUN.items():
        assert [code for where, _, code in BLOCKS if where == page and line in code], (page, line)
        assert why


def test_all_fences_of_pages_are_closed_and_python_parses() -> None:
    for page in PAGES:
        assert len(re.findall(r"^```", page.read_text(encoding="utf-8"), re.MULTILINE)) % 2 == 0, page
    assert len(BLOCKS) >= 16
