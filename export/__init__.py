"""From a checkpoint to a served artifact: ONNX, parity, bundles, the torch-free runtime, the server."""
