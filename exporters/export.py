"""Export a checkpoint to a bundle: graph, precisions, parity check and manifest. The entry point of the exporters."""

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
    options: ExportOptions | None = None,
    site: SiteData | None = None,
    key: PrivateKey | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export a checkpoint folder to a bundle.

    Args:
        checkpoint: folder written by `resight adapt`.
        out: the bundle folder to create.
        name: name of the model; by default the name of ``out``, normalised by `model_name`.
        options: the forms to export in addition to fp32.
        site: the site's crops and evaluation functions.
        key: private key that signs the bundle.
        replace: replace an existing bundle at ``out``.
        progress: called with the name of each step when it begins.

    Raises:
        CheckpointError: the checkpoint is damaged or of another architecture.
        BundleError: an exported graph does not reproduce the encoder, or INT8 lacks crops.
        AlreadyExistsError: ``out`` exists.
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
        options=options,
        site=site,
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
    options: ExportOptions | None = None,
    site: SiteData | None = None,
    key: PrivateKey | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export an encoder in memory to a bundle; the encoder itself is not modified.

    The manifest's ``evaluation`` holds the measurements and, for each requested form that was skipped, the reason.

    Raises:
        BundleError: a weight is not finite, an exported graph does not reproduce the encoder, or INT8 lacks crops.
        AlreadyExistsError: ``out`` exists.
    """
    options, site = options or ExportOptions(), site or SiteData()
    require_crops(options, site)
    report = progress or (lambda step: None)
    require_free_folder(out, replace=replace)
    encoder = copy.deepcopy(encoder).cpu().float().eval()
    broken = [key for key, tensor in encoder.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise BundleError(f"weights {', '.join(broken[:3])} are not finite: adapt again from valid weights")
    image = encoder.config.image
    report("reference features")
    probes = make_probes(image, run_torch(encoder))
    report("graph")
    model = to_onnx(ServingGraph(encoder), image)
    report("parity")
    fp32 = Graph(model, verify_graph(model, probes, what="the ONNX graph"))
    forms = make_forms(fp32, probes, options, site, report)
    calibration = None
    if site.calibrate is not None:
        report("calibration")
        calibration = site.calibrate(run_onnx(model))
    report("files")
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
    """Id of an encoder's embedding space: a hash of its config and of every tensor its global feature depends on.

    All exports of one checkpoint share the id, whatever the precision or the version of the exporter.
    """
    config = encoder.config
    shape = f"{config.backbone} {config.pooling} {config.embedding_dim}"
    heads = "heads." if config.local_share else "heads.global."
    if config.local_share:  # omitted otherwise: unused parts do not change the feature
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
    """Normalise a folder name to a model name: ``My Site (2)`` becomes ``my-site-2``."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:63] or "model"
