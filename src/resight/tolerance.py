"""How near a runtime must come to what was exported: one table for every runtime, exporter and precision."""

from __future__ import annotations

from resight.manifest import Artefact
from resight.probes import MIN_COSINE

# The smallest cosine of a probe's feature to torch's in fp32, whatever its own export reached.
LEAST_COSINE = {
    "fp32": MIN_COSINE,
    "fp16": 0.999,  # half floats keep 11 bits, 5e-4 of a value; trunks of 50 layers stay above it
}
# INT8 is held to the parity of its own export, less this: machines sum and round INT8 differently. The same graphs
# (OSNet x0.25 and the built-in encoder, per-channel, symmetric or not) in onnxruntime 1.31 with its VNNI kernels and
# with its float emulation moved the cosine of a probe by at most 0.0086, and the smallest of 16 by 0.0055.
INT8_SLACK = 0.01


def least_cosine(artefact: Artefact) -> float:
    """The smallest cosine similarity to the stored features at which a runtime may serve a form of the model.

    Args:
        artefact: the manifest's entry: its precision, and the parity it had when it was exported.

    Returns:
        A cosine, at most 1.
    """
    fixed = LEAST_COSINE.get(artefact.precision)
    return artefact.min_cosine - INT8_SLACK if fixed is None else fixed
