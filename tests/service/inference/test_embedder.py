import asyncio
import io
import time

import numpy as np
import pytest
from PIL import Image, ImageFilter
from serving import jpeg

from resight.errors import DeadlineError, ImageUndecodableError, InputError, OverloadedError
from resight.image import ImageSpec, decode, fit, quality
from resight.runtime.base import DummyRuntime
from resight.service.inference.embedder import Embedded, Embedder, Timings, combine_crops, require_embedded
from resight.service.settings import Settings

SPEC = ImageSpec(height=64, width=32)
RUNTIME = DummyRuntime(SPEC)


def run(test, tmp_path, **settings):
    async def body():
        embedder = Embedder(Settings(bundle=tmp_path, data=tmp_path, **settings))
        embedder.start()
        try:
            return await test(embedder)
        finally:
            await embedder.stop()

    return asyncio.run(body())


def test_features_equal_those_of_offline_decoding(tmp_path):
    crops = [jpeg(n, size=(40 + n, 90)) for n in range(40)]

    async def test(embedder):
        return await embedder.embed(RUNTIME, crops, time.monotonic() + 60)

    found = run(test, tmp_path)
    expected = DummyRuntime(SPEC).embed(np.stack([fit(decode(crop), SPEC) for crop in crops]))
    assert np.array_equal(np.stack([one.feature for one in found]), expected)
    assert all(0 < one.quality < 1 and one.timings.decode_ns > 0 for one in found)


def test_limits_of_the_settings_are_enforced(tmp_path):
    async def test(embedder):
        return await embedder.embed(RUNTIME, [jpeg(1, size=(30, 30)), jpeg(1, size=(64, 64))], time.monotonic() + 60)

    small, large = run(test, tmp_path, max_image_pixels=1000)
    assert isinstance(small, Embedded) and "at most 1000" in str(large)


def test_a_batch_over_the_queue_limit_is_refused_before_decoding(tmp_path):
    async def test(embedder):
        with pytest.raises(OverloadedError):
            await embedder.embed(RUNTIME, [b"not decoded"] * 65, time.monotonic() + 60)
        with pytest.raises(DeadlineError):
            await embedder.embed(RUNTIME, [jpeg(1)], time.monotonic() - 1)
        (outcome,) = await embedder.embed(RUNTIME, [b"decoded"], time.monotonic() + 60)
        assert isinstance(outcome, ImageUndecodableError)

    run(test, tmp_path, max_queue=64)


def embedded(values, figure):
    row = np.array(values, np.float32)
    return Embedded(row / np.linalg.norm(row), figure, Timings(1, 2, 3))


def test_shots_are_weighted_by_quality():
    joined = combine_crops([embedded([1, 0], 0.9), embedded([0, 1], 0.3)])
    assert joined.feature == pytest.approx(np.array([0.9, 0.3]) / np.hypot(0.9, 0.3), abs=1e-6)
    assert joined.quality == pytest.approx(0.6)
    assert joined.timings == Timings(2, 2, 6)
    even = combine_crops([embedded([1, 0], 0.0), embedded([0, 1], 0.0)])
    assert even.feature == pytest.approx([2**-0.5, 2**-0.5])
    with pytest.raises(InputError, match="cancel out"):
        combine_crops([embedded([1, 0], 0.5), embedded([-1, 0], 0.5)])


def test_the_first_failure_is_raised_with_its_field():
    bad = ImageUndecodableError("broken")
    with pytest.raises(ImageUndecodableError) as raised:
        require_embedded([embedded([1, 0], 1.0), bad], ["shots.images[0].data", "shots.images[1].data"])
    assert raised.value.field == "shots.images[1].data"


def figure(image: Image.Image) -> float:
    pixels = np.asarray(image)
    return quality(fit(pixels, SPEC), pixels.shape[:2])


def test_quality_falls_with_blur_size_and_wrong_exposure():
    sharp = Image.open(io.BytesIO(jpeg(3, size=(64, 128)))).convert("RGB")
    sharp = Image.fromarray(
        (np.asarray(sharp) // 2 + np.indices((128, 64)).sum(0)[..., None] % 8 * 8 + 30).astype(np.uint8)
    )
    good = figure(sharp)
    assert 0.4 < good <= 1.0
    assert figure(sharp.filter(ImageFilter.GaussianBlur(4))) < good
    assert figure(sharp.resize((16, 32))) < good
    assert figure(sharp.point(lambda v: min(255, v * 4))) < good
    assert figure(Image.new("RGB", (64, 128))) == 0.0
    assert figure(Image.new("RGB", (64, 128), (255, 255, 255))) == 0.0
