"""ONNX artifacts: export, parity with PyTorch, registration, and the files that other programs read."""
