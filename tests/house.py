"""The package in figures: rooms and their imports, sizes of modules and functions, and how docstrings begin.

    python -m tests.house

Prints the figures, and exits with 1 where one is beyond its bound.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "wsi_gradcam"

# From the ground up. A room imports from rooms that stand before it, and from no other.
ROOMS = (
    "errors",
    "geometry",
    "system",
    "io",
    "pages",
    "slides",
    "inputs",
    "tissue",
    "models",
    "cam",
    "gradcam",
    "mil",
    "results",
    "run",
    "executors",
    "audit",
    "evidence",
    "export",
    "viewer",
    "doctor",
    "card",
    "api",
    "demo",
    "cli",
)
FRAGMENTS = frozenset({"What", "Who", "Whether", "Where", "Which", "How"})
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Bounds:
    """The most that each figure may be."""

    top_modules: int = 6
    modules: int = 190
    longest_module: int = 500
    longest_function: int = 90
    median_function: float = 8
    p90_function: float = 25
    fragment_share: float = 0.05
    format_skips: int = 10


@dataclass(frozen=True)
class House:
    """The figures of the package; lengths in lines."""

    top_modules: int
    modules: int
    lines: int
    median_module: float
    longest_module: int
    longest_function: int
    median_function: float
    p90_function: float
    fragment_share: float
    format_skips: int

    def beyond(self, bounds: Bounds) -> list[str]:
        """Return a line for each figure that is larger than its bound."""
        found = asdict(self)
        return [
            f"{name} is {found[name]}, at most {most}" for name, most in asdict(bounds).items() if found[name] > most
        ]


@cache
def modules() -> dict[str, Path]:
    """Return all modules by dotted name without "wsi_gradcam."; a package's `__init__` by the package's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str:
    """Return the room of a module: its first folder, or its own name where it lies at the top."""
    return module.partition(".")[0]


@cache
def tree_of(path: Path) -> ast.Module:
    """Return a file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports_of(path: Path, typing_too: bool = False) -> frozenset[str]:
    """Return the full names of all modules that a file imports, also inside functions.

    Imports below `if TYPE_CHECKING:` do not run; they count only with `typing_too`.
    """
    return frozenset(_imports(tree_of(path), typing_too))


def _imports(node: ast.AST, typing_too: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test) and not typing_too:
            continue
        if isinstance(child, ast.Import):
            yield from (name.name for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import"
            assert child.module is not None
            for name in child.names:  # `from package import module` imports the module
                inner = f"{child.module}.{name.name}"
                yield inner if inner.removeprefix("wsi_gradcam.") in modules() else child.module
        yield from _imports(child, typing_too)


def room_imports() -> dict[str, dict[str, str]]:
    """Return, for each room, the rooms that it imports, each with a module that does so."""
    found: dict[str, dict[str, str]] = {room: {} for room in ROOMS}
    for module, path in modules().items():
        if not module:
            continue  # the front door may know all
        for name in imports_of(path):
            package, _, other = name.partition(".")
            if package == "wsi_gradcam" and other and room_of(other) != room_of(module):
                found.setdefault(room_of(module), {})[room_of(other)] = module
    return found


def count() -> House:
    """Count the package as it lies on disk."""
    texts = {path: path.read_text(encoding="utf-8") for path in modules().values()}
    lengths = [text.count("\n") for text in texts.values()]
    nodes = [node for path in texts for node in ast.walk(tree_of(path))]
    functions = [node.end_lineno - node.lineno + 1 for node in nodes if isinstance(node, Function) and node.end_lineno]
    documented = [node for node in nodes if isinstance(node, Function | ast.ClassDef | ast.Module)]
    first_words = [text.split()[0] for node in documented if (text := ast.get_docstring(node))]
    return House(
        top_modules=len(list(PACKAGE.glob("*.py"))),
        modules=len(texts),
        lines=sum(lengths),
        median_module=median(lengths),
        longest_module=max(lengths),
        longest_function=max(functions),
        median_function=median(functions),
        p90_function=quantiles(functions, n=10)[-1],
        fragment_share=round(sum(word in FRAGMENTS for word in first_words) / len(first_words), 4),
        format_skips=_format_skips(),
    )


def _format_skips() -> int:
    """Count the places that the formatter is told to leave alone, in tracked Python files."""
    marker = "fmt: " + "skip"  # in two parts, so that this line is none
    listed = subprocess.run(
        ["git", "grep", "-c", marker, "--", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode <= 1:
        return sum(int(line.rpartition(":")[2]) for line in listed.stdout.splitlines())
    files = (path for path in ROOT.rglob("*.py") if ".venv" not in path.as_posix())  # no checkout: a source archive
    return sum(path.read_text(encoding="utf-8").count(marker) for path in files)


def main() -> int:
    """Print the figures; return 1 where one is beyond its bound."""
    house = count()
    for name, value in asdict(house).items():
        print(f"{name:18} {value}")
    beyond = house.beyond(Bounds())
    for line in beyond:
        print(line, file=sys.stderr)
    return int(bool(beyond))


if __name__ == "__main__":
    sys.exit(main())
