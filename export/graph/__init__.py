"""The fused ONNX graph of a decoder."""
