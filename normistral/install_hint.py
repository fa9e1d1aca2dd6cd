"""How this package is installed: the words of every hint that says so.

It is on no package index yet. An extra can be asked for by the package's name all the same, where the package is
installed: pip then takes what is there, and the extra's packages from its index. A release is a wheel file, or a
checkout.
"""

from __future__ import annotations

SOURCE = "a wheel's file, or . in a checkout"
UPGRADE = f"install a newer normistral: pip install --upgrade SOURCE, which is {SOURCE}"
REINSTALL = f"install it again: pip install --force-reinstall --no-deps SOURCE, which is {SOURCE}"


def extra(*names: str) -> str:
    """The command that adds extras to an installed normistral."""
    return f'pip install "normistral[{",".join(names)}]"'
