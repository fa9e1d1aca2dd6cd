"""Sizes, import directions and class names of the package.

python scripts/house.py [ROOT] [--json]        make house [ARGS=--json]

Every `import` below ROOT/normistral is read with `ast`; nothing is imported. Exit code 1: a target in `HELD` is missed.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_high
from typing import Any

PACKAGE = "normistral"
LONGEST_LINES = 500
SMALL_LINES = 60
# Row -> what it must be. The others are orientations.
HELD = {"import circles": 0, "upward imports": 0}


@dataclass
class Module:
    """One file: what it imports at module level, and what it names anywhere (lazy and typing imports, strings)."""

    name: str
    path: Path
    lines: int
    is_package: bool
    classes: list[str]
    eager: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)

    @property
    def room(self) -> str:
        """Folder below the package; "" for a file of the ground floor."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 2 or (self.is_package and len(parts) > 1) else ""


def read_package(root: Path) -> dict[str, Module]:
    """Name -> module, with its imports reduced to modules of the package."""
    trees, modules = {}, {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        text = path.read_text(encoding="utf-8")
        trees[name] = tree = ast.parse(text)
        classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        modules[name] = Module(name, path.relative_to(root), len(text.splitlines()), is_package, classes)
    for name, tree in trees.items():
        module = modules[name]
        module.eager = set(_imports(_module_level(tree), modules)) - {name}
        strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        named = {text for text in strings if isinstance(text, str) and text in modules and "." in text}
        module.named = (set(_imports(ast.walk(tree), modules)) | named) - {name}
    return modules


def _module_level(node: ast.AST) -> Iterator[ast.AST]:
    """Statements that run on import: not bodies of functions, nor what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _module_level(child)


def _imports(nodes: Iterator[ast.AST], modules: dict[str, Module]) -> Iterator[str]:
    """Modules of the package; a parent's `__init__` counts only where a name is taken from it."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else str(node.module)


def find_circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""
    reach: dict[str, set[str]] = {}
    for name in edges:
        reach[name], pending = set(), [name]
        while pending:
            new = edges[pending.pop()] - reach[name]
            reach[name] |= new
            pending += new
    groups = {tuple(sorted(other for other in reach[name] if name in reach[other])) for name in edges}
    return [list(group) for group in sorted(groups) if group]


def find_upward(root: Path, modules: dict[str, Module]) -> tuple[list[str], list[str]]:
    """Imports against the layers that pyproject.toml gives to import-linter, lazy ones too; those that it excepts.

    The package's own `__init__`, which loads its public names lazily, and `__main__` may import upward.
    """
    with (root / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    upward, excepted = set(), set()
    for contract in (contract for contract in contracts if contract["type"] == "layers"):
        floors: dict[str, int] = {}
        for height, layer in enumerate(reversed(contract["layers"])):
            for name in layer.replace("|", ":").split(":"):
                for container in contract.get("containers", [""]):
                    inner = name.strip(" ()")
                    floors[f"{container}.{inner}" if container else inner] = height
        for module in modules.values():
            floor = _floor(module.name, floors)
            if floor is not None and module.name not in (PACKAGE, f"{PACKAGE}.__main__"):
                above = {other for other in module.named if (_floor(other, floors) or 0) > floor}
                upward |= {f"{module.name} -> {other}" for other in above}
        excepted |= upward & set(contract.get("ignore_imports", []))
    return sorted(upward - excepted), sorted(excepted)


def _floor(name: str, floors: dict[str, int]) -> int | None:
    while name and name not in floors:
        name = name.rpartition(".")[0]
    return floors.get(name)


def examine(root: Path) -> dict[str, Any]:
    """Row -> count, or the list of places that are counted."""
    modules = read_package(root)
    importers: dict[str, set[str]] = defaultdict(set)
    homes: dict[str, list[str]] = defaultdict(list)
    rooms: dict[str, list[int]] = defaultdict(list)
    for module in modules.values():
        rooms[module.room].append(module.lines)
        for other in module.named:
            importers[other].add(module.name)
        for name in module.classes:
            homes[name].append(module.name)
    small = [
        f"{module.path} ({module.lines}) <- {next(iter(importers[module.name]))}"
        for module in modules.values()
        if module.lines < SMALL_LINES and len(importers[module.name]) == 1
        if not module.is_package and module.path.stem not in ("__main__", "_version") and module.room != "commands"
    ]
    upward, excepted = find_upward(root, modules)
    sizes = {str(module.path): module.lines for module in modules.values()}
    longest = max(sizes, key=lambda path: sizes[path])
    return {
        "lines": sum(sizes.values()),
        "files": len(sizes),
        "median file": median_high(sizes.values()),
        "longest file": f"{sizes[longest]} {longest}",
        f"files over {LONGEST_LINES} lines": [f"{path} ({n})" for path, n in sizes.items() if n > LONGEST_LINES],
        "import circles": [", ".join(c) for c in find_circles({name: m.eager for name, m in modules.items()})],
        "circles with lazy imports": [
            ", ".join(c) for c in find_circles({name: m.named - {PACKAGE} for name, m in modules.items()})
        ],
        "upward imports": upward,
        "upward imports, excepted by name": excepted,
        f"files under {SMALL_LINES} lines, one importer": sorted(small),
        "class names twice": [f"{n}: {', '.join(at)}" for n, at in sorted(homes.items()) if len(at) > 1],
        "rooms": {room or "(ground floor)": [len(of), sum(of)] for room, of in sorted(rooms.items())},
    }


def main() -> int:
    """Print the rows; 1 if a held target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = examine(arguments.root)
    counts = {name: len(value) if isinstance(value, list) else value for name, value in rows.items()}
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        counts.pop("rooms")
        for name, (files, lines) in rows["rooms"].items():
            print(f"{name:38}{files:4} files {lines:6} lines")
        for name, value in counts.items():
            print(f"{name:38}{value}")
            places = rows[name] if isinstance(rows[name], list) else []
            print("".join(f"    {place}\n" for place in places), end="")
    missed = [name for name, held in HELD.items() if counts[name] > held]
    for name in missed:
        print(f"missed: {name}: {counts[name]}, {HELD[name]} allowed", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
