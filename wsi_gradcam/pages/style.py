"""How reports look."""

from pathlib import Path

STYLE = (Path(__file__).parent / "layout.css").read_text(encoding="utf-8")
