"""What answers lm-eval: PyTorch, ONNX and endpoint engines behind one lm-eval model."""
