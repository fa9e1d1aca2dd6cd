"""What an import costs, seen from fresh processes."""

import resource
import subprocess
import sys

import pytest

HEAVY = {
    *("torch", "transformers", "tokenizers", "openvino", "onnxruntime", "onnx", "nncf", "optimum", "accelerate"),
    *("huggingface_hub", "safetensors", "gguf", "jinja2", "rich", "prompt_toolkit", "numpy"),
}
NOT_IN_A_RUNTIME_INSTALL = HEAVY - {"openvino", "tokenizers", "jinja2", "rich", "prompt_toolkit", "numpy"}

LIST_MODULES = """
import sys
{code}
print(*{{name.partition(".")[0] for name, module in sys.modules.items() if module is not None}})
"""


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has imported after running `code`."""
    done = subprocess.run(
        [sys.executable, "-c", LIST_MODULES.format(code=code)], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


def processor_seconds(*arguments: str) -> float:
    """Of this interpreter with these arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"]])
def test_the_help_comes_at_once_and_imports_nothing_heavy(arguments: list[str]) -> None:
    """Within 0.3 s of processor time, whatever else the machine does; more only where Python itself is slow."""
    seconds, of_typer = [], []
    for _ in range(5):
        seconds.append(processor_seconds("-m", "normistral", *arguments))
        of_typer.append(processor_seconds("-c", "import typer, rich.console"))
    assert min(seconds) < max(0.3, 4 * min(of_typer)), (seconds, of_typer)
    imported = modules_after(f"from normistral.cli import main; main({arguments!r})")
    assert "normistral" in imported
    assert not imported & HEAVY


def test_a_command_imports_no_other_command() -> None:
    code = "from normistral.cli import main; main(['rm', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}"], capture_output=True, text=True, check=True)
    imported = {name for name in done.stdout.split() if name.startswith("normistral.commands.")}
    assert "normistral.commands.models" in imported  # where rm stands
    assert not imported & {"normistral.commands.chat", "normistral.commands.export"}


@pytest.mark.parametrize("module", ["normistral", "normistral.artifact.store", "normistral.hardware", "normistral.cli"])
def test_importing_it_imports_nothing_heavy(module: str) -> None:
    assert not modules_after(f"import {module}") & HEAVY


def test_the_runtime_needs_nothing_of_the_export_extra() -> None:
    code = """
import pkgutil, importlib, normistral.runtime
for found in pkgutil.walk_packages(normistral.runtime.__path__, "normistral.runtime."):
    importlib.import_module(found.name)
"""
    imported = modules_after(code)
    assert "normistral" in imported
    assert not imported & NOT_IN_A_RUNTIME_INSTALL


def test_public_names_are_all_there() -> None:
    """Lazily loaded names that do not exist would only fail when used."""
    imported = modules_after("import normistral; [getattr(normistral, name) for name in normistral.__all__]")
    assert not imported & {"torch", "transformers", "openvino", "optimum", "nncf"}


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import normistral

    assert not hasattr(normistral, "nonsense")
    assert "load" in dir(normistral)
