"""From a checkpoint to a served artifact: ONNX graphs, parity, bundles, the torch-free runtime, the server."""
