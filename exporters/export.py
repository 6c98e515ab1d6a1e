"""Checkpoint to bundle: graph, files, parity, manifest. The one entry point of the exporters."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime
import torch

from resight.bundle.bundle import Bundle, Graph, open_bundle, require_free_folder, write_bundle
from resight.bundle.manifest import space_id
from resight.bundle.probes import make_probes
from resight.bundle.signing import PrivateKey
from resight.encoder.checkpoint import load_checkpoint
from resight.encoder.model import Encoder
from resight.errors import BundleError
from resight.exporters.forms import ExportOptions, SiteData, make_forms, require_crops
from resight.exporters.int8 import Progress
from resight.exporters.onnx_graph import ServingGraph, to_onnx
from resight.exporters.verify import run_onnx, run_torch, verify_bundle, verify_graph


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    name: str | None = None,
    wanted: ExportOptions | None = None,
    lent: SiteData | None = None,
    key: PrivateKey | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Make a bundle of a checkpoint folder.

    Args:
        checkpoint: what `resight adapt` wrote.
        out: the bundle folder to make.
        name: of the model; ``out``'s own name by default, spelled as names are.
        wanted: which forms beside fp32.
        lent: the site's crops and measures.
        key: signs the bundle.
        replace: whether a bundle at ``out`` gives way.
        progress: told which step begins.

    Raises:
        CheckpointError: the checkpoint is damaged or of another architecture.
        BundleError: an exported graph does not reproduce the encoder, or INT8 lacks crops.
        AlreadyExistsError: something stands at ``out``.
    """
    loaded = load_checkpoint(checkpoint)
    origin = loaded.provenance
    return export_encoder(
        loaded.encoder,
        out,
        name=name or model_name(out.name),
        training={
            "recipe": dict(origin.recipe),
            "config": loaded.encoder.config.to_json(),
            "stage": origin.stage,
            "epoch": origin.epoch,
            "store_fingerprint": origin.store_fingerprint,
            "initial_weights": dict(origin.initial_weights),
        },
        weights_licence=origin.initial_weights.get("licence") or "unknown",
        wanted=wanted,
        lent=lent,
        key=key,
        replace=replace,
        progress=progress,
    )


def export_encoder(
    encoder: Encoder,
    out: Path,
    *,
    name: str,
    training: Mapping[str, Any],
    weights_licence: str,
    wanted: ExportOptions | None = None,
    lent: SiteData | None = None,
    key: PrivateKey | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Make a bundle of an encoder in memory, which is left as it is.

    What was measured, and why a form that was asked for is missing, stands in the manifest's ``evaluation``.

    Raises:
        BundleError: a weight is not finite, an exported graph does not reproduce the encoder, or INT8 lacks crops.
        AlreadyExistsError: something stands at ``out``.
    """
    wanted, lent = wanted or ExportOptions(), lent or SiteData()
    require_crops(wanted, lent)
    tell = progress or (lambda step: None)
    require_free_folder(out, replace=replace)
    encoder = copy.deepcopy(encoder).cpu().float().eval()
    broken = [key for key, tensor in encoder.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise BundleError(f"weights {', '.join(broken[:3])} are not finite: adapt again from sound weights")
    image = encoder.config.image
    tell("reference features")
    probes = make_probes(image, run_torch(encoder))
    tell("graph")
    model = to_onnx(ServingGraph(encoder), image)
    tell("parity")
    fp32 = Graph(model, verify_graph(model, probes, what="the ONNX graph"))
    forms = make_forms(fp32, probes, wanted, lent, tell)
    calibration = None
    if lent.calibrate is not None:
        tell("calibration")
        calibration = lent.calibrate(run_onnx(model))
    tell("files")
    write_bundle(
        out,
        name=name,
        space_id=encoder_space_id(encoder),
        image=image,
        graphs=forms.graphs,
        probes=probes,
        weights_licence=weights_licence,
        training=training,
        evaluation=forms.evaluation(),
        versions={
            "numpy": numpy.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "resight": version("resight"),
            "torch": torch.__version__,
        },
        calibration=calibration,
        key=key,
        replace=replace,
    )
    bundle = open_bundle(out)
    verify_bundle(bundle)
    return bundle


def encoder_space_id(encoder: Encoder) -> str:
    """Name an encoder's embedding space by its config and every tensor its global feature depends on.

    Two exports of one checkpoint share it, whatever the precision or the version of the exporter.
    """
    config = encoder.config
    shape = f"{config.backbone} {config.pooling} {config.embedding_dim}"
    heads = "heads." if config.local_share else "heads.global."
    if config.local_share:  # left out elsewhere: unused parts change nothing
        shape += f" {config.parts} {config.part_dim} {config.local_share}"
    digest = hashlib.sha256(shape.encode())
    parts = {"mean": encoder.mean, "std": encoder.std}
    for key, tensor in encoder.state_dict().items():
        if key.startswith(("backbone.", heads)) and not key.endswith("num_batches_tracked"):
            parts[key] = tensor
    for key in sorted(parts):
        digest.update(key.encode() + b"\0" + parts[key].detach().cpu().float().contiguous().numpy().tobytes())
    return space_id(digest.digest(), config.image, encoder.feature_dim)


def model_name(text: str) -> str:
    """Turn a folder's name into a model's: ``My Site (2)`` becomes ``my-site-2``."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:63] or "model"
