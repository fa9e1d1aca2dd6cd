"""Write the API reference from the docstrings, as HTML pages that need no network; a warning is an error.

python -W error scripts/api_reference.py [build/api]        make docs
python -W error scripts/api_reference.py --check            renders and writes nothing; part of make check
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pdoc.doc
import pdoc.render

# The package's face, and the modules that docs/ tells a reader to import.
MODULES = (
    "normistral",
    "normistral.errors",
    "normistral.runtime.engines.base",
    "normistral.runtime.engines.scripted",
    "normistral.runtime.structured.compile",
)
_NAMED = re.compile(r"`(normistral(?:\.\w+)+)`")


def load(name: str) -> pdoc.doc.Module:
    """A module with its lazily imported public names in place, where pdoc looks for them."""
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        setattr(module, public, getattr(module, public))
    return pdoc.doc.Module(module)


def render() -> dict[str, str]:
    """File name -> page, for every module, the index and its search."""
    pdoc.render.configure(docformat="markdown", search=True)
    modules = {name: load(name) for name in MODULES}
    pages = {f"{name.replace('.', '/')}.html": pdoc.render.html_module(one, modules) for name, one in modules.items()}
    pages["index.html"] = pdoc.render.html_index(modules)
    pages["search.js"] = pdoc.render.search_index(modules)
    return pages


def find_mistakes() -> Iterator[str]:
    """Public names without a docstring, and names of the package in docstrings that do not exist."""
    for name in MODULES:
        for member in _walk(load(name)):
            if not member.docstring and member.kind in ("class", "function", "module"):
                yield f"{member.fullname} has no docstring"
            for named in _NAMED.findall(member.docstring):
                if not _exists(named):
                    yield f"{member.fullname} names {named}, which does not exist"


def _walk(outer: pdoc.doc.Namespace) -> Iterator[pdoc.doc.Doc]:
    yield outer
    for member in outer.own_members if outer.kind == "class" else outer.members.values():
        if member.name.startswith("_"):
            continue
        if isinstance(member, pdoc.doc.Class):
            yield from _walk(member)
        elif inspect.getmodule(member.obj) is not None:
            yield member


def _exists(dotted: str) -> bool:
    module, _, rest = dotted, "", ""
    while module:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest = f"{last}.{rest}" if rest else last
            continue
        for part in filter(None, rest.split(".")):
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def main() -> int:
    """Exit code 1 if there is a mistake."""
    # A type that only a type checker imports is shown as it is written.
    warnings.filterwarnings("ignore", "Error parsing type annotation")
    mistakes = list(find_mistakes())
    for mistake in mistakes:
        print(f"error: {mistake}", file=sys.stderr)
    pages = render()
    if "--check" not in sys.argv[1:]:
        folder = Path(sys.argv[1] if sys.argv[1:] else "build/api")
        for name, page in pages.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(page, encoding="utf-8")
        print(f"{folder}/index.html", file=sys.stderr)
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
