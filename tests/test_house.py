"""The package stays in its bounds, and what counts it sees what it should see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.house import Bounds, count, imports_of


def test_the_package_stays_in_its_bounds() -> None:
    assert count().beyond(Bounds()) == []


@pytest.mark.parametrize("name", ["modules", "longest_function", "p90_function", "format_skips"])
def test_a_figure_beyond_its_bound_is_named(name: str) -> None:
    house = count()
    tight = replace(Bounds(), **{name: getattr(house, name) - 1})
    said = f"{name} is {getattr(house, name)}, at most {getattr(tight, name)}"
    assert set(house.beyond(tight)) - set(house.beyond(Bounds())) == {said}


def test_imports_count_wherever_they_run(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "from wsi_gradcam.errors import ConfigError\n"
        "if TYPE_CHECKING:\n"
        "    from wsi_gradcam.geometry import Region\n"
        "def late():\n"
        "    from wsi_gradcam import api\n",
        encoding="utf-8",
    )
    assert imports_of(file) == {"typing", "wsi_gradcam.errors", "wsi_gradcam.api"}
    assert imports_of(file, typing_too=True) == {
        "typing",
        "wsi_gradcam.errors",
        "wsi_gradcam.geometry",
        "wsi_gradcam.api",
    }
