"""The serving graph of a bundle as one ONNX file: RGB bytes in, unit vectors out.

Pixel normalisation and L2 normalisation are part of the graph. Dynamic batch size, standard operators, no external
data.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from resight.bundle.graph_check import check_graph
from resight.bundle.manifest import GRAPH_INPUT, GRAPH_OUTPUT
from resight.encoder.model import Encoder, join_views, split_stripes
from resight.image import ImageSpec


class ServingGraph(nn.Module):
    """An encoder's embedding with pixel and L2 normalisation inside, without the heads it does not use.

    The division by the standard deviation is folded into the first convolution (exact: it is linear).
    The mean is subtracted, not folded: a convolution pads with zeros, and zero means "average colour" only
    after the subtraction.
    """

    mean: Tensor

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        source = copy.deepcopy(encoder).cpu().float().eval()
        self.config = source.config
        self.backbone = source.backbone
        # a list: "global" is a Python keyword, and the exporter generates Python code
        self.heads = nn.ModuleList(list(source.heads.values())[: None if source.config.local_share else 1])
        self.register_buffer("mean", source.mean)
        first = next(module for module in self.backbone.modules() if isinstance(module, nn.Conv2d))
        assert first.in_channels == 3, "the trunk's first convolution must be the one that sees the image"
        with torch.no_grad():
            first.weight /= source.std.view(1, 3, 1, 1)
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: uint8 (N, H, W, 3) RGB, fitted by `resight.image.fit`.

        Returns:
            float32 (N, D), unit rows.
        """
        # Cast first: TensorRT accepts a uint8 input only if a cast follows it. The cost is not measurable.
        pixels = images.float().permute(0, 3, 1, 2) - self.mean  # (N, 3, H, W)
        maps = split_stripes(self.backbone(pixels), self.config.parts)
        views = [_unit_rows(head(part)) for head, part in zip(self.heads, maps, strict=False)]
        return join_views(views, self.config.local_share) if self.config.local_share else views[0]


def _unit_rows(features: Tensor) -> Tensor:
    """Rows of length 1."""
    length: Tensor = features.norm(dim=1, keepdim=True)
    return features / length.clamp_min(1e-12)


OPSET = 20  # the newest opset that torch's exporter is tested with; onnxruntime supports it since 1.17
log = logging.getLogger(__name__)


def to_onnx(graph: ServingGraph, image: ImageSpec) -> bytes:
    """Export a graph to ONNX, fold its constants and batch norms, and check the result.

    Args:
        graph: in eval mode.
        image: the fixed height and width; the batch size is dynamic.

    Returns:
        A serialised ONNX model: input ``images`` uint8 (batch, H, W, 3), output ``features`` float32 (batch, D).

    Raises:
        BundleError: the result is not a self-contained standard ONNX model of that form.
    """
    example = torch.zeros((2, image.height, image.width, 3), dtype=torch.uint8)  # 1 would become a constant
    with _quiet_exporter(), torch.no_grad():
        program: Any = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[GRAPH_INPUT],
            output_names=[GRAPH_OUTPUT],
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
    """Silence the exporter's log of each pass and its deprecation warnings.

    Errors are still found: the graph checker and the probes detect a wrong graph.
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
    """Remove source lines and module paths of the exporting machine, half of the file for a small model."""
    model.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    model.graph.ClearField("value_info")
    for part in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
