"""The serving graph as one ONNX file: dynamic batch, standard operators, no external data."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch

from resight.errors import BundleError
from resight.exporters.graph import ServingGraph
from resight.image import ImageSpec

INPUT, OUTPUT = "images", "features"
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
    check_onnx(model, image)
    operators = sorted({node.op_type for node in model.graph.node})
    log.debug("onnx nodes=%d bytes=%d operators=%s", len(model.graph.node), model.ByteSize(), ",".join(operators))
    return model.SerializeToString(deterministic=True)


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


def check_onnx(model: onnx.ModelProto, image: ImageSpec) -> None:
    """Check that a model is valid, self-contained, of standard operators and of the bundle's signature.

    Raises:
        BundleError: it is not.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BundleError(f"the exported graph is not valid ONNX: {error}") from error
    domains = {opset.domain for opset in model.opset_import} | {node.domain for node in model.graph.node}
    external = [tensor.name for tensor in model.graph.initializer if tensor.external_data]
    if domains - {"", "ai.onnx"} or model.functions or external:
        raise BundleError(
            f"expected one self-contained graph of standard operators, found domains {sorted(domains)}, "
            f"{len(model.functions)} functions and external tensors {external[:3]}: export with a supported torch"
        )
    found = [_signature(value) for value in (*model.graph.input, *model.graph.output)]
    wanted = (INPUT, onnx.TensorProto.UINT8, [0, image.height, image.width, 3])
    output_fits = len(found) == 2 and found[1][:2] == (OUTPUT, onnx.TensorProto.FLOAT) and found[1][2][:1] == [0]
    if not output_fits or found[0] != wanted or len(found[1][2]) != 2:
        raise BundleError(f"expected input {wanted} and output ({OUTPUT}, float32, [0, D]), found {found}")


def _signature(value: onnx.ValueInfoProto) -> tuple[str, int, list[int]]:
    """Name, element type and shape of an input or output; 0 stands for a free dimension."""
    tensor = value.type.tensor_type
    return value.name, tensor.elem_type, [dimension.dim_value for dimension in tensor.shape.dim]


def _strip(model: onnx.ModelProto) -> None:
    """Drop traces of the exporting machine: source lines and module paths, half the file for a small model."""
    model.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    model.graph.ClearField("value_info")
    for part in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
