"""ONNX graphs of a checkpoint: the plain one that Optimum traces, and the fused one that onnxruntime runs fastest."""
