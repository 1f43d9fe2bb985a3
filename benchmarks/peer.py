"""Serves somebody else's network, to be compared with other servers on the same one.

    python -m benchmarks.peer PORT      # the model is named by $BENCH_MODEL

The harness in ../shared/peers gives every server one ONNX file (float32 `x` [N, 3, 32, 32], normalised, to logits `y`). This
puts preprocessing, class maps and metadata around it (contract 2) and starts the service as anyone would. The harness's
entry is in docs/performance.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from app.engine.artifact import CONTRACT, METADATA_KEY

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
SIDE = 32


def wrap(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network with uint8 pixels [N, 32, 32, 3] as input and logits and class maps as outputs.

    Raises:
        ValueError: the network does not end with global average pooling and a linear layer.
    """
    graph = model.graph
    nodes = list(graph.node)
    pooling = [node for node in nodes if node.op_type in {"GlobalAveragePool", "ReduceMean"}]
    linear = [node for node in nodes if node.op_type == "Gemm"]
    if not pooling or not linear:
        raise ValueError("no global average pooling followed by a linear layer")
    weights = numpy_helper.to_array(next(t for t in graph.initializer if t.name == linear[-1].input[1]))
    if weights.shape[0] != len(CLASSES):
        weights = weights.T
    constants = {
        "scale": (1 / (255 * np.asarray(STD))).astype(np.float32),
        "shift": (np.asarray(MEAN) / np.asarray(STD)).astype(np.float32),
        "head": np.ascontiguousarray(weights[:, :, None, None]),
    }
    before = [
        helper.make_node("Cast", ["images"], ["pixels"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["pixels", "scale"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "shift"], ["normalised"]),
        helper.make_node("Transpose", ["normalised"], ["x"], perm=[0, 3, 1, 2]),
    ]
    after = [
        helper.make_node("Identity", ["y"], ["logits"]),
        helper.make_node("Conv", [pooling[-1].input[0], "head"], ["class_maps"]),
    ]
    wrapped = helper.make_graph(
        before + nodes + after,
        "peer",
        [helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["N", SIDE, SIDE, 3])],
        [
            helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["N", len(CLASSES)]),
            helper.make_tensor_value_info("class_maps", onnx.TensorProto.FLOAT, ["N", len(CLASSES), "h", "w"]),
        ],
        [*graph.initializer, *(numpy_helper.from_array(value, name) for name, value in constants.items())],
    )
    result = helper.make_model(wrapped, opset_imports=model.opset_import, ir_version=model.ir_version)
    metadata = {
        "contract": CONTRACT,
        "name": "peer",
        "version": "0",
        "classes": CLASSES,
        "input_size": SIDE,
        "resize": {"mode": "squash", "filter": "bilinear"},
        "temperature": 1.0,
    }
    result.metadata_props.add(key=METADATA_KEY, value=json.dumps(metadata))
    onnx.checker.check_model(result, full_check=True)
    return result


def main() -> None:
    """Wraps the model and becomes the server."""
    content = wrap(onnx.load(os.environ["BENCH_MODEL"])).SerializeToString()
    path = Path(tempfile.gettempdir()) / f"peer-{hashlib.sha256(content).hexdigest()[:16]}.onnx"
    path.write_bytes(content)
    path.with_name(path.name + ".sha256").write_text(hashlib.sha256(content).hexdigest())
    os.environ["CONVMIXER_MODEL"] = str(path)
    os.environ["CONVMIXER_COALESCE"] = "false"  # the harness sends the same images again and again
    os.execv(sys.executable, [sys.executable, "-m", "app.cli", "serve", "--port", sys.argv[1]])  # noqa: S606


if __name__ == "__main__":
    main()
