"""The command that compiles the kernel."""

from __future__ import annotations

from normistral.terminal.arguments import Debug


def build_kernel(debug: Debug = False) -> None:
    """Compile this package's own int4 products for OpenVINO. Prints where they lie.

    Takes seconds and a C++ compiler (g++ or clang++; CXX names another), for processors with AVX2, AVX-VNNI or
    AVX512. From then on they serve int4 OpenVINO artifacts on the CPU, unless --set int4_kernel=openvino or --exact
    is given.
    """
    from normistral.hardware import read_machine
    from normistral.runtime.kernels.library import build_library

    print(build_library(read_machine()))
