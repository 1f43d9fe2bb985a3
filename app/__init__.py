"""The service: an exported classifier behind HTTP. Knows the ONNX artifact and nothing of how it was made."""

__version__ = "0.2.0"
