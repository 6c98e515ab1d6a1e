"""Opening person detectors by name, and the detectors of torchvision.

Other kinds are in `resight.training.ingest.onnx_detector` (an ONNX file) and `resight.training.ingest.boxes` (boxes
read from a file).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from resight.errors import DetectorError
from resight.training.ingest.boxes import COCO_PERSON, MIN_SCORE, Boxes, Detector, make_boxes
from resight.training.ingest.footage import Frame

TORCHVISION_BUILDERS = {
    "fasterrcnn-mobilenet": "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn": "fasterrcnn_resnet50_fpn_v2",
    "retinanet": "retinanet_resnet50_fpn_v2",
    "fcos": "fcos_resnet50_fpn",
    "ssdlite": "ssdlite320_mobilenet_v3_large",
}
DETECTOR_CHOICES = f"{', '.join(TORCHVISION_BUILDERS)}, or the path of an .onnx file with a YOLO or SSD head"


def open_detector(name: str, *, weights: Path | None = None, device: str = "cpu") -> Detector:
    """Open a detector.

    Args:
        name: one of `TORCHVISION_BUILDERS`, or the path of an ONNX file.
        weights: state dict for a detector of torchvision; None for torchvision's own, downloaded once.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        DetectorError: an unknown name, weights that are not available or do not fit, or a graph that is refused.
    """
    if name.lower().endswith(".onnx"):
        from resight.training.ingest.onnx_detector import OnnxDetector

        if weights is not None:
            raise DetectorError("an ONNX detector includes its weights: omit --detector-weights", field="weights")
        return OnnxDetector(Path(name), device=device)
    if name not in TORCHVISION_BUILDERS:
        raise DetectorError(f"no detector {name!r}: expected {DETECTOR_CHOICES}", field="detector")
    return TorchvisionDetector(name, weights=weights, device=device)


class TorchvisionDetector:
    """A detector of torchvision, trained on COCO.

    Args:
        name: one of `TORCHVISION_BUILDERS`.
        weights: torchvision's state dict for 91 categories; None for torchvision's own (BSD-3-Clause), downloaded and
            cached by torchvision.
        device: device of the computation.
        state: a state dict to use instead of ``weights``.

    Raises:
        DetectorError: the weights are not available, cannot be read or do not fit.
    """

    def __init__(
        self, name: str, *, weights: Path | None, device: str = "cpu", state: Mapping[str, Any] | None = None
    ) -> None:
        builder = TORCHVISION_BUILDERS[name]
        if state is None:
            state, source = _download_weights(builder) if weights is None else (_read_weights(weights), str(weights))
        else:
            source = "given"
        model = torchvision.models.get_model(builder, weights=None, weights_backbone=None)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise DetectorError(
                f"{source} does not fit {builder}: {str(error).splitlines()[-1].strip()[:200]}: expected torchvision's "
                "own state dict of 91 categories"
            ) from error
        self.identity: Mapping[str, str] = {"detector": builder, "weights_sha256": _sha256_of(state)}
        self._model, self._device = model.eval().to(device), device

    def find(self, frame: Frame) -> Boxes:
        """Boxes in pixels, clipped to the frame; see `Detector.find`."""
        image = torch.from_numpy(frame.image).to(self._device).permute(2, 0, 1).float() / 255  # (3, H, W)
        with torch.inference_mode():
            (found,) = self._model([image])
        keep = (found["labels"] == COCO_PERSON) & (found["scores"] >= MIN_SCORE)
        xyxy, scores = (found[part][keep].cpu().numpy().astype(np.float64) for part in ("boxes", "scores"))
        return make_boxes(xyxy, scores).within(*frame.image.shape[:2])


def _download_weights(builder: str) -> tuple[Mapping[str, Any], str]:
    """Torchvision's weights, from its cache or the network."""
    weights = torchvision.models.get_model_weights(builder).DEFAULT
    try:
        return weights.get_state_dict(check_hash=True), str(weights)
    except (OSError, RuntimeError) as error:  # no network, or a wrong hash
        raise DetectorError(
            f"torchvision's {weights} could not be downloaded ({error}): on a machine without network, copy the file "
            f"{Path(weights.url).name} there and pass it with --detector-weights"
        ) from error


def _read_weights(path: Path) -> Mapping[str, Any]:
    """A state dict, read by torch's restricted unpickler."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DetectorError(
            f"{path} cannot be read ({error.strerror}): expected a state dict of torchvision"
        ) from error
    except Exception as error:  # on malformed files the unpickler raises errors of many kinds
        raise DetectorError(
            f"{path} is not a state dict that can be read safely: expected the file torchvision downloads, or one "
            "written by torch.save(model.state_dict(), path)"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise DetectorError(f"{path} contains {type(content).__name__}, expected a state dict: names and tensors")
    return content


def _sha256_of(state: Mapping[str, Any]) -> str:
    """sha256 of the names and the bytes of the tensors."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
