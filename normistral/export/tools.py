"""The packages of an export: presence, output, versions."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from normistral.artifact.manifest import ArtifactFormat
from normistral.errors import MissingExtraError, install_extra

_MODULES: dict[ArtifactFormat, tuple[str, ...]] = {
    "openvino": ("torch", "transformers", "nncf", "openvino_tokenizers", "optimum.exporters.openvino.convert"),
    "onnx": ("torch", "transformers", "onnx", "onnxruntime", "optimum.exporters.onnx.model_configs"),
}
_DISTRIBUTIONS: dict[ArtifactFormat, tuple[str, ...]] = {
    "openvino": ("optimum-intel", "nncf", "openvino", "openvino-tokenizers"),
    "onnx": ("optimum-onnx", "onnx"),
}
_EXTRAS: dict[ArtifactFormat, tuple[str, ...]] = {"openvino": ("export",), "onnx": ("export", "onnx")}


def find_export_tools(format: ArtifactFormat) -> None:
    """Check that all packages of an export are installed, without importing them.

    Raises:
        MissingExtraError: an extra is not installed.
    """
    for module in _MODULES[format]:
        package = module.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            raise _missing(package, format)


def require_export_tools(format: ArtifactFormat) -> None:
    """Import everything an export needs.

    Raises:
        MissingExtraError: an extra is installed only in part.
    """
    # Huge pages, where the system gives them to those who ask: PyTorch reads it at its first tensor. At the 7B's widths
    # its temporary tensors fault a tenth as often, and a layer of `best` with 2,048 tokens takes 7 to 11 % less time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        with _patient_threads():
            for module in _MODULES[format]:
                importlib.import_module(module)
    except ImportError as exc:
        raise _missing(exc.name or "optimum", format) from exc


@contextmanager
def _patient_threads() -> Iterator[None]:
    """Set PyTorch's OpenMP threads to sleep while they wait for each other; OpenMP reads its environment once.

    By default they spin, and on cores that others use too the spinning takes the time of whom they wait for: beside the
    export of a 7B, one of the demo model was not done after ten minutes, in place of two. Alone it costs 3 %.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        yield
    finally:
        os.environ.pop("OMP_WAIT_POLICY", None)


def _missing(package: str, format: ArtifactFormat) -> MissingExtraError:
    return MissingExtraError(
        f"exporting needs the package {package}, which is not installed",
        f"install it with: {install_extra(*_EXTRAS[format])}",
    )


def with_plain_partials(kind: type[Any]) -> type[Any]:
    """One of Optimum's configurations whose attributes that are partials are called without an instance.

    functools.partial is a method from Python 3.14 on (3.13 warns): what Optimum 2.1 keeps as a class's attribute to be
    called with a model's configuration would get itself as well.
    """
    attributes = {name: inspect.getattr_static(kind, name) for name in dir(kind)}
    partials = {name: staticmethod(value) for name, value in attributes.items() if isinstance(value, partial)}
    return type(kind.__name__, (kind,), {**partials, "__module__": kind.__module__})


def export_config(format: ArtifactFormat, config: Any) -> Any:
    """Optimum's export configuration for a decoder with past keys and values among its inputs.

    Args:
        config: the transformers configuration.
    """
    from optimum.exporters.tasks import TasksManager

    importlib.import_module(f"optimum.exporters.{format}.model_configs")  # registers them
    constructor = TasksManager.get_exporter_config_constructor(
        exporter=format, model_type=config.model_type, task="text-generation-with-past", library_name="transformers"
    )
    kind = with_plain_partials(constructor.func)  # the constructor is a partial that knows only the task
    return kind(config, task="text-generation", use_past=True, use_past_in_inputs=True)


@contextmanager
def quiet_tools(format: ArtifactFormat | None) -> Iterator[None]:
    """Keep the tools' own bars, tables and warnings off stdout and stderr; ours say what matters.

    Args:
        format: whose tools run; None where only transformers does.
    """
    from transformers.utils import logging as transformers_logging

    with ExitStack() as restore:
        restore.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if format == "openvino":
            import nncf
            from nncf.common.logging.logger import nncf_logger

            restore.callback(nncf.set_log_level, nncf_logger.level)
            nncf.set_log_level(logging.ERROR)
        elif format == "onnx":
            from optimum.utils import logging as optimum_logging

            restore.callback(optimum_logging.set_verbosity, optimum_logging.get_verbosity())
            optimum_logging.set_verbosity(logging.ERROR)
        restore.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
        transformers_logging.set_verbosity_error()
        if transformers_logging.is_progress_bar_enabled():
            restore.callback(transformers_logging.enable_progress_bar)
        transformers_logging.disable_progress_bar()
        yield


def tool_versions(format: ArtifactFormat) -> dict[str, str]:
    """Versions of the packages that take part in an export."""
    versions = {name: version(name) for name in ("normistral", "torch", "transformers", "optimum")}
    versions |= {name: version(name) for name in _DISTRIBUTIONS[format]}
    if format == "onnx":  # several distributions bring this module: for CPUs, for GPUs, of other vendors
        versions["onnxruntime"] = importlib.import_module("onnxruntime").__version__
    return versions
