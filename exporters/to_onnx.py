"""The serving graph as one ONNX file: dynamic batch, standard operators, no external data."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch

from resight.exporters.graph import ServingGraph
from resight.graph_check import INPUT, OUTPUT, check_graph
from resight.image import ImageSpec

OPSET = 20  # torch's newest tested translation; onnxruntime has run it since 1.17
log = logging.getLogger(__name__)


def to_onnx(graph: ServingGraph, image: ImageSpec) -> bytes:
    """Translate a graph, fold its constants and batch norms, and check the result.

    Args:
        graph: in eval mode.
        image: the height and width to fix; the batch stays free.

    Returns:
        A serialised ONNX model: input ``images`` uint8 (batch, H, W, 3), output ``features`` float32 (batch, D).

    Raises:
        BundleError: the result is not a self-contained standard ONNX model of that form.
    """
    example = torch.zeros((2, image.height, image.width, 3), dtype=torch.uint8)  # a batch of 1 would be fixed
    with _quiet_exporter(), torch.no_grad():
        program: Any = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            optimize=True,
            verbose=False,
        )
    model: onnx.ModelProto = program.model_proto
    _strip(model)
    data = model.SerializeToString(deterministic=True)
    check_graph(data, image, None, what="the exported graph")
    operators = sorted({node.op_type for node in model.graph.node})
    log.debug("onnx nodes=%d bytes=%d operators=%s", len(model.graph.node), model.ByteSize(), ",".join(operators))
    return data


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's pass-by-pass log and its own deprecations away from the user.

    Nothing is lost: a wrong graph is caught by the checker and the probes.
    """
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _strip(model: onnx.ModelProto) -> None:
    """Drop traces of the exporting machine: source lines and module paths, half the file for a small model."""
    model.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    model.graph.ClearField("value_info")
    for part in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
