"""Tiny ONNX networks of the shapes that OpenCV's and InsightFace's face recognition load.

Their "faces" are bright blocks of 32 px; the brighter, the higher the score and the smaller the box. Their embeddings
are coarse versions of the crop.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

STRIDES = (8, 16, 32)
LANDMARKS = np.array([-1, -0.8, 1, -0.8, 0, 0, -0.8, 1, 0.8, 1], np.float32)  # eyes, nose, corners of the mouth


def save_yunet(path: Path) -> None:
    """A detector with YuNet's outputs, of pixels from 0 to 255."""
    nodes, constants = _brightness(shape=(1, -1, 1), scale=1 / 255, offset=0.0)
    outputs = {}
    for kind, width in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
        for stride in STRIDES:
            outputs[f"{kind}_{stride}"] = (kind, stride, (1, "n", width))
    constants |= {
        "kps": LANDMARKS.reshape(1, 1, 10),
        "bbox": np.array([0.5, 0.5, -2.0, -2.0], np.float32).reshape(1, 1, 4),
        "least": np.array([0.0, 0.0, 3.0, 3.0], np.float32).reshape(1, 1, 4),  # the last two: logarithms of strides
    }
    _save(path, nodes, constants, outputs)


def save_scrfd(path: Path) -> None:
    """A detector with SCRFD's nine outputs, two anchors a place, of pixels less 127.5 by 128."""
    nodes, constants = _brightness(shape=(-1, 1), scale=128 / 255, offset=0.5)
    outputs = {}
    for kind, width in (("score", 1), ("bbox", 4), ("kps", 10)):
        for stride in STRIDES:
            outputs[f"{kind}_{stride}"] = (kind, stride, ("n", width))
    constants |= {"kps": LANDMARKS.reshape(1, 10)}
    constants |= {"bbox": np.full((1, 4), -4.0, np.float32), "least": np.full((1, 4), 7.0, np.float32)}
    _save(path, nodes, constants, outputs, anchors=2)


def save_embedder(path: Path) -> None:
    """112x112 crops to their means over squares of 14 px: 192 numbers."""
    nodes = [
        helper.make_node("AveragePool", ["data"], ["pooled"], kernel_shape=[14, 14], strides=[14, 14]),
        helper.make_node("Flatten", ["pooled"], ["fc1"]),
    ]
    graph = helper.make_graph(
        nodes,
        "embedder",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, [1, 3, 112, 112])],
        [helper.make_tensor_value_info("fc1", TensorProto.FLOAT, [1, 192])],
    )
    _write(graph, path)


def _brightness(shape: tuple[int, ...], scale: float, offset: float) -> tuple[list, dict[str, np.ndarray]]:
    nodes = [
        helper.make_node("ReduceMean", ["input", "channels"], ["gray"], keepdims=1),
        helper.make_node("Mul", ["gray", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "offset"], ["bright"]),
    ]
    constants = {
        "channels": np.array([1], np.int64),
        "scale": np.array(scale, np.float32),
        "offset": np.array(offset, np.float32),
        "shape": np.array(shape, np.int64),
        "nothing": np.array(0, np.float32),
        "once": np.array(1, np.float32),
    }
    for stride in STRIDES:
        pooled, flat = f"pooled_{stride}", f"flat_{stride}"
        pool = {"kernel_shape": [stride, stride], "strides": [stride, stride]}
        nodes.append(helper.make_node("AveragePool", ["bright"], [pooled], **pool))
        nodes.append(helper.make_node("Reshape", [pooled, "shape"], [flat]))
    return nodes, constants


def _save(path: Path, nodes: list, constants: dict, outputs: dict, anchors: int = 1) -> None:
    described = []
    for name, (kind, stride, shape) in outputs.items():
        flat = f"flat_{stride}"
        if anchors > 1:
            many = f"many_{name}"
            nodes.append(helper.make_node("Concat", [flat] * anchors, [f"side_{name}"], axis=1))
            nodes.append(helper.make_node("Reshape", [f"side_{name}", "shape"], [many]))
            flat = many
        if kind in ("cls", "obj", "score"):  # of the coarsest stride alone
            there = stride == STRIDES[-1]
            nodes.append(helper.make_node("Mul", [flat, "once" if there else "nothing"], [name]))
        elif kind == "bbox":
            nodes.append(helper.make_node("Mul", [flat, "bbox"], [f"less_{name}"]))
            nodes.append(helper.make_node("Add", [f"less_{name}", "least"], [name]))
        else:
            nodes.append(helper.make_node("Mul", [flat, "nothing"], [f"zero_{name}"]))
            nodes.append(helper.make_node("Add", [f"zero_{name}", "kps"], [name]))
        described.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, "h", "w"])],
        described,
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    _write(graph, path)


def _write(graph: onnx.GraphProto, path: Path) -> None:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
