"""Custom int4 matmul kernels for OpenVINO on CPUs."""
