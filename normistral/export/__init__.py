"""Conversion of a checkpoint into an artifact: open, quantize, write, verify; knows no servers and no terminals.

One way down: pipeline → verify → onnx, openvino → job → quantize → reference → checkpoint → recipe, staging, tools.
Needs the extra `export`.
"""
