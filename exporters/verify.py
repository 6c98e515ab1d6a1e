"""Parity checks: the same probes through torch and through each exported form, at batch sizes 1 and 7."""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from resight.arrays import Pixels
from resight.bundle.bundle import Bundle
from resight.bundle.graph_check import check_graph
from resight.bundle.probes import MIN_COSINE, EmbedBatch, Parity, Probes, check_probes, measure_parity, min_cosine_for
from resight.encoder.model import Encoder
from resight.errors import BundleError
from resight.machine import threads
from resight.runtime.onnx import open_session


def run_torch(encoder: Encoder) -> EmbedBatch:
    """An embedding function that runs the encoder itself on the CPU, in eval mode and fp32: the reference."""

    def run(pixels: Pixels) -> NDArray[np.float32]:
        with torch.inference_mode():
            features: NDArray[np.float32] = encoder.embed(encoder.normalise(torch.from_numpy(pixels))).numpy()
        return features

    return run


def run_onnx(model: bytes) -> EmbedBatch:
    """An embedding function that runs an ONNX model in onnxruntime on the CPU, as the service does.

    Raises:
        BundleError: onnxruntime does not accept it.
    """
    try:
        session = open_session(model, threads())
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise BundleError(f"onnxruntime {onnxruntime.__version__} does not accept the graph: {error}") from error
    name = session.get_inputs()[0].name

    def run(pixels: Pixels) -> NDArray[np.float32]:
        features: NDArray[np.float32] = session.run(None, {name: pixels})[0]
        return features

    return run


def verify_graph(model: bytes, probes: Probes, *, what: str, min_cosine: float = MIN_COSINE) -> Parity:
    """Compare an ONNX model with the reference features of the probes.

    Raises:
        BundleError: the smallest cosine similarity is below ``min_cosine``.
    """
    parity = measure_parity(probes, run_onnx(model))
    if parity.min_cosine < min_cosine:
        raise BundleError(
            f"{what} differs from the torch model: min cosine {parity.min_cosine:.6f}, max difference "
            f"{parity.max_abs_diff:.2e} over {len(probes.jpegs)} probes, expected a cosine of at least {min_cosine}"
        )
    return parity


def verify_bundle(bundle: Bundle) -> dict[str, Parity]:
    """Run every ONNX form of a bundle, read from its files, on the bundle's own probes.

    Returns:
        Parity by file name.

    Raises:
        BundleError: a form does not reproduce the probes' features, or this machine decodes the images differently.
    """
    probes = bundle.probes()
    found = {}
    for artefact in bundle.manifest.artefacts:  # TensorRT's INT8 form too: onnxruntime computes it in float
        data = bundle.read(artefact.precision, artefact.runtime)
        check_graph(data, bundle.manifest.image, bundle.manifest.feature_dim, what=artefact.file)
        found[artefact.file] = check_probes(
            probes, bundle.manifest.image, run_onnx(data), what=artefact.file, min_cosine=min_cosine_for(artefact)
        )
    return found
