import pytest
import references_forms
import references_tensorrt
from serving import make_bundle

from resight.errors import BundleError, StartupError
from resight.exporters.tensorrt import build_engines, engine_precisions


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    return references_forms.make_forms(tmp_path_factory.mktemp("forms") / "b")


def test_every_form_is_built_verified_and_loaded_by_the_service(monkeypatch, forms, tmp_path):
    machine = references_tensorrt.install(monkeypatch)
    steps: list[str] = []
    built = build_engines(forms, cache=tmp_path / "engines", max_batch=16, progress=steps.append)
    assert [engine.precision for engine in built] == ["fp32", "fp16", "int8"]
    assert steps == [f"TensorRT engine {engine.precision}" for engine in built]
    assert built[0].min_cosine > 0.9999 and built[1].min_cosine > 0.999
    exported = forms.find("fp32"), forms.find("fp16"), forms.find("int8", "tensorrt")
    for engine, artefact in zip(built, exported, strict=True):
        assert abs(engine.min_cosine - artefact.min_cosine) < 1e-5
    assert machine.memory == {}
    machine.calls.clear()
    from resight.runtime.tensorrt import TensorRTRuntime

    TensorRTRuntime(forms, precision="fp16", max_batch=16, engine_cache=tmp_path / "engines")
    assert "parse" not in machine.calls


def test_a_missing_form_is_reported_before_anything_is_built(monkeypatch, tmp_path):
    machine = references_tensorrt.install(monkeypatch)
    bundle = make_bundle(tmp_path / "b")
    assert engine_precisions(bundle) == ("fp32",)
    with pytest.raises(BundleError, match=r"no graph of int8 for TensorRT, only of fp32.*--precision int8 --tensorrt"):
        build_engines(bundle, ["fp32", "int8"], cache=tmp_path / "engines")
    assert machine.calls == [] and not (tmp_path / "engines").exists()


def test_without_tensorrt_the_error_names_the_package_and_the_extra(tmp_path):
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(StartupError, match=r"package tensorrt.*resight\[gpu\]"):
            build_engines(make_bundle(tmp_path / "b"), cache=tmp_path / "engines")
    else:
        pytest.skip("tensorrt is installed: nothing is missing")
