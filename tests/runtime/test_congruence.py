"""Every available runtime computes the same features for every precision of a bundle."""

import numpy as np
import onnxruntime as ort
import pytest
import references_forms
import references_tensorrt
from serving import SPEC, embed_by_hand

from resight.bundle.probes import INT8_SLACK, MIN_COSINE_BY_PRECISION, measure_parity, min_cosine_for
from resight.errors import StartupError
from resight.runtime.engine import load_cudart, load_tensorrt
from resight.runtime.onnx import PROVIDERS
from resight.runtime.providers import open_runtime

MAX_BATCH = 32
PRECISIONS = ("fp32", "fp16", "int8")
RUNTIMES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
    pytest.param("ort-tensorrt", id="ort-tensorrt", marks=pytest.mark.gpu),
    pytest.param("tensorrt", id="tensorrt", marks=pytest.mark.gpu),
    pytest.param("stand-in", id="tensorrt-stand-in"),
]


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    return references_forms.make_forms(tmp_path_factory.mktemp("forms") / "b")


@pytest.fixture
def provider(request, monkeypatch):
    """The provider's name; skips with the reason if it cannot run."""
    if request.param == "stand-in":
        references_tensorrt.install(monkeypatch)
        return "tensorrt"
    if request.param == "tensorrt":
        try:
            load_tensorrt(), load_cudart()
        except StartupError as error:
            pytest.skip(str(error))
    elif PROVIDERS[request.param] not in ort.get_available_providers():
        pytest.skip(f"this onnxruntime has no {PROVIDERS[request.param]}: install onnxruntime-gpu")
    return request.param


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("provider", RUNTIMES, indirect=True)
def test_every_runtime_agrees_with_the_model_at_every_batch(forms, provider, precision, tmp_path):
    runtime = open_runtime(
        forms, provider=provider, precision=precision, max_batch=MAX_BATCH, engine_cache=tmp_path / "engines"
    )
    assert runtime.provider == f"{provider}-{precision}"
    kind = "tensorrt" if "tensorrt" in provider and precision == "int8" else "onnx"
    least = min_cosine_for(forms.find(precision, kind))
    again = measure_parity(forms.probes(), runtime.embed).min_cosine
    assert again >= least and abs(again - runtime.min_cosine) < 1e-4
    crops = np.random.default_rng(0).integers(0, 256, (MAX_BATCH, SPEC.height, SPEC.width, 3), dtype=np.uint8)
    alone = np.concatenate([runtime.embed(crops[row : row + 1]) for row in range(MAX_BATCH)])
    for count in (1, 7, MAX_BATCH):
        found = runtime.embed(crops[:count])
        assert found.dtype == np.float32 and np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-3
        assert (found * embed_by_hand(crops[:count])).sum(1).min() >= least
        # A crop's feature does not depend on the rest of its batch.
        assert (found * alone[:count]).sum(1).min() >= MIN_COSINE_BY_PRECISION["fp32"]


def test_each_precision_has_its_own_minimum_cosine(forms):
    assert [min_cosine_for(forms.find(precision)) for precision in ("fp32", "fp16")] == [0.9999, 0.999]
    for kind in ("onnx", "tensorrt"):
        artefact = forms.find("int8", kind)
        assert min_cosine_for(artefact) == artefact.min_cosine - INT8_SLACK
