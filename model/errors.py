"""Failures of the export, where they can be imported without onnx and onnxruntime."""


class ExportError(Exception):
    """The exported graph does not answer as the network does, or is not self-contained. No file was written."""
