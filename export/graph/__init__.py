"""The fused ONNX graph of a decoder.

`families` describes a transformers model as a `decoder.Decoder`, one table entry per model family; `write` writes that
as an ONNX graph. A new family is one entry in `families.table.FAMILIES` and one in tests/families.py.
"""
