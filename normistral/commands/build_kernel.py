"""`normistral build-kernel`: compiles the int4 kernels for OpenVINO."""

from __future__ import annotations

from normistral.commands.options import Debug


def build_kernel(debug: Debug = False) -> None:
    """Compile the faster int4 kernel for OpenVINO. Prints where they lie.

    Seldom needed: wheels for Linux on x86-64 bring them, and an installation from source compiles them where there is
    a C++ compiler. It is for an installation without one, for a changed source, and for another OpenVINO than theirs.
    Takes seconds and a compiler (g++ or clang++; CXX names another), for processors with AVX2, AVX-VNNI or AVX512.
    """
    from normistral.hardware import read_machine
    from normistral.runtime.kernels.library import build_library

    print(build_library(read_machine()))
