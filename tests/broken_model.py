"""A released model that answers no number for one picture, for tests of what then happens."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx


def write_broken_model(artifact: Path, output: str, path: Path) -> str:
    """Writes a model, and its hash beside it, that answers NaN where the whole picture is white.

    Args:
        artifact: the model it is made of.
        output: `logits` or `similarity`.
        path: file to write.

    Returns:
        SHA-256 of the file.
    """
    model = onnx.load(artifact)
    (maker,) = [node for node in model.graph.node if output in node.output]
    maker.output[list(maker.output).index(output)] = "number"
    constants = {"axes": [1, 2, 3], "white": np.float32(255), "shape": [-1] if output == "similarity" else [-1, 1]}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.array(value), name) for name, value in constants.items())
    node = onnx.helper.make_node
    model.graph.node.extend(
        [
            node("Cast", ["images"], ["pixels"], to=onnx.TensorProto.FLOAT),
            node("ReduceMin", ["pixels", "axes"], ["darkest"], keepdims=0),
            node("Sub", ["darkest", "white"], ["zero_if_white"]),
            node("Div", ["zero_if_white", "zero_if_white"], ["nan_if_white"]),
            node("Reshape", ["nan_if_white", "shape"], ["factor"]),
            node("Mul", ["number", "factor"], [output]),
        ]
    )
    onnx.save(model, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")
    return digest
