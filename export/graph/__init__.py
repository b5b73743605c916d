"""The fused ONNX graph of a decoder.

`families` describes a transformers model as a `decoder.Decoder`, one table entry per model family; `decoder` writes
that as an ONNX graph. A new family is one entry in `families.FAMILIES` and one in tests/families.py.
"""
