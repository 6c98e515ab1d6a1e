"""A batch computed in parts equals the whole batch, for any size and number of cores."""

from __future__ import annotations

import numpy as np
import pytest
from exports import draw_crops, export

from resight.exporters.verify import run_onnx
from resight.runtime.onnx import CpuSession, session_options

pytestmark = pytest.mark.long


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_split_batches_give_the_same_features(threads: int) -> None:
    session = CpuSession(export("osnet_x0_25"), threads)
    crops = draw_crops()
    whole = run_onnx(export("osnet_x0_25"))(crops[:33])
    for size in (1, 2, 3, 7, 32, 33):
        features = session.run(crops[:size])
        assert features.shape == (size, whole.shape[1]) and features.dtype == np.float32
        np.testing.assert_allclose(features, whole[:size], atol=1e-5)


def test_concurrent_calls_do_not_mix_their_parts() -> None:
    from concurrent.futures import ThreadPoolExecutor

    session, crops = CpuSession(export("osnet_x0_25"), 2), draw_crops()
    whole = session.run(crops[:32])
    starts = [int(start) for start in np.random.default_rng(0).integers(0, 24, 40)]
    with ThreadPoolExecutor(4) as pool:
        for start, features in zip(starts, pool.map(lambda at: session.run(crops[at : at + 8]), starts), strict=True):
            np.testing.assert_allclose(features, whole[start : start + 8], atol=1e-5)


def test_a_failing_part_fails_the_batch() -> None:
    session = CpuSession(export("osnet_x0_25"), 2)
    with pytest.raises(
        Exception, match="Got invalid dimensions"
    ):  # onnxruntime's own error, which the runtime converts
        session.run(draw_crops()[:8, :32])


def test_session_options_spare_cores_and_memory() -> None:
    options = session_options(2)
    assert options.intra_op_num_threads == 2 and options.inter_op_num_threads == 1
    assert options.enable_cpu_mem_arena and not options.enable_mem_pattern
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
