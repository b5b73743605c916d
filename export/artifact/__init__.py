"""An ONNX artifact: exported, checked for parity, registered, opened by other programs."""
