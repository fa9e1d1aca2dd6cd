"""An artifact's folder for a loader that reads the IR itself, with the kernel's operator in the place of products.

Only openvino_model.xml is written, without the edges to weights that the kernel has in its own layout; everything else
is a link. Nothing is constructed from layers that no output needs, so the weights behind those edges are never read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from xml.etree import ElementTree

from normistral.errors import EngineError, ResourceError
from normistral.runtime.kernels.openvino_int4 import NUMBER, OPERATOR, OPERATOR_SET, PackedWeights


@contextmanager
def folder_with_kernel(model_file: Path, packed: PackedWeights) -> Iterator[Path]:
    """A folder like the model's, for as long as it takes to load; the loader has to know `packed.library`.

    Raises:
        ResourceError: there is no room for a few megabytes of temporary files.
        EngineError: the IR does not fit the weights.
    """
    document = ElementTree.parse(model_file)
    _replace_products(document.getroot(), packed)
    with ExitStack() as stack:
        try:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="normistral-")))
            for path in model_file.parent.iterdir():
                if path.name != model_file.name:
                    (scratch / path.name).symlink_to(path.resolve())
            document.write(scratch / model_file.name)
        except OSError as exc:
            raise ResourceError(
                f"cannot write temporary files: {exc.strerror}", "free some space, or name another folder in TMPDIR"
            ) from exc
        yield scratch


def _replace_products(net: ElementTree.Element, packed: PackedWeights) -> None:
    missing = set(packed.numbers)
    replaced: set[str | None] = set()
    for layer in net.iterfind("layers/layer"):
        name = layer.get("name", "")
        number = packed.numbers.get(name)
        inputs, data = layer.find("input"), layer.find("data")
        if number is None or inputs is None or data is None:
            continue
        layer.set("type", OPERATOR)
        layer.set("version", OPERATOR_SET)
        data.attrib = {NUMBER: str(number)}
        inputs.remove(inputs[1])
        replaced.add(layer.get("id"))
        missing.discard(name)
    if missing:
        raise EngineError(f"the model has no product {min(missing)}", "export the artifact again")
    edges = net.find("edges")
    assert edges is not None
    for edge in list(edges):
        if edge.get("to-layer") in replaced and edge.get("to-port") == "1":
            edges.remove(edge)
