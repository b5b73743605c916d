"""From a checkpoint to a served artifact.

`commands` > `artifact` (export, parity, registration) > `quantize` (precisions) and `server` (OpenAI-compatible HTTP) >
`graph` (fused ONNX graphs by model family), `runtime` (torch-free) and `bundle` (for serving hosts); each imports only
to its right. `pyfunc` is the loader that MLflow imports; limbeck.runtime is the public way to run an artifact.
"""
