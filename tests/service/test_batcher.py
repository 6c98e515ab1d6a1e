import asyncio
import threading
import time

import numpy as np
import pytest

from resight.errors import DeadlineError, ModelError, OverloadedError
from resight.image import ImageSpec
from resight.service.batcher import Batcher
from resight.service.runtime import DummyRuntime

SPEC = ImageSpec(height=16, width=16)
SOON, FAR = 30.0, 600.0


def crop(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 254, (16, 16, 3), dtype=np.uint8)


class GatedRuntime(DummyRuntime):
    """The dummy behind a gate, noting each batch; a crop that begins with 255 makes it fail, with 254 answer NaN."""

    def __init__(self, max_batch: int = 8) -> None:
        super().__init__(SPEC, max_batch=max_batch)
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.batches: list[int] = []

    def embed(self, images):
        self.batches.append(len(images))
        self.started.set()
        assert self.gate.wait(SOON)
        if (images[:, 0, 0, 0] == 255).any():
            raise RuntimeError("poison")
        features = super().embed(images)
        features[images[:, 0, 0, 0] == 254] = np.nan
        return features


async def submit(batcher: Batcher, image: np.ndarray, deadline: float | None = None):
    deadline = time.monotonic() + FAR if deadline is None else deadline
    with batcher.admit(1, deadline):
        return await batcher.embed(image, deadline)


def run(test, *, max_batch: int = 8, max_queue: int = 64):
    async def body():
        runtime = GatedRuntime(max_batch)
        batcher = Batcher(runtime, max_queue=max_queue)
        batcher.start()
        try:
            await asyncio.wait_for(test(batcher, runtime), SOON)
        finally:
            runtime.gate.set()
            await batcher.stop()

    asyncio.run(body())


async def blocked(batcher: Batcher, runtime: GatedRuntime) -> asyncio.Task:
    """A first crop that keeps the model busy until the gate opens."""
    runtime.gate.clear()
    task = asyncio.create_task(submit(batcher, crop(0)))
    await asyncio.to_thread(runtime.started.wait, SOON)
    return task


def test_each_caller_gets_the_feature_of_its_own_crop():
    async def test(batcher, runtime):
        images = [crop(seed) for seed in range(37)]
        found = await asyncio.gather(*(submit(batcher, image) for image in images))
        expected = DummyRuntime(SPEC).embed(np.stack(images))
        assert np.array_equal(np.stack([one.feature for one in found]), expected)
        assert sum(runtime.batches) == 37 and max(runtime.batches) <= 8

    run(test)


def test_what_comes_while_the_model_is_busy_is_one_batch_and_an_idle_model_does_not_wait():
    async def test(batcher, runtime):
        first = await blocked(batcher, runtime)
        others = [asyncio.create_task(submit(batcher, crop(seed))) for seed in range(1, 6)]
        await asyncio.sleep(0.02)
        runtime.gate.set()
        await asyncio.gather(first, *others)
        assert runtime.batches == [1, 5]

    run(test)


def test_a_full_queue_refuses_and_says_when_to_come_back():
    async def test(batcher, runtime):
        first = await blocked(batcher, runtime)
        second = asyncio.create_task(submit(batcher, crop(1)))
        await asyncio.sleep(0.02)
        with pytest.raises(OverloadedError) as refused:
            await submit(batcher, crop(2))
        assert refused.value.retry_after_s > 0
        with pytest.raises(OverloadedError), batcher.admit(2, time.monotonic() + FAR):
            raise AssertionError("admitted")
        runtime.gate.set()
        await asyncio.gather(first, second)
        await submit(batcher, crop(3))

    run(test, max_queue=2)


def test_what_expires_in_the_queue_never_reaches_the_model():
    async def test(batcher, runtime):
        first = await blocked(batcher, runtime)
        late = asyncio.create_task(submit(batcher, crop(1), time.monotonic() + 0.05))
        good = asyncio.create_task(submit(batcher, crop(2)))
        await asyncio.sleep(0.1)
        runtime.gate.set()
        with pytest.raises(DeadlineError):
            await late
        await asyncio.gather(first, good)
        assert runtime.batches == [1, 1]

    run(test)


def test_a_deadline_that_has_passed_is_not_admitted():
    async def test(batcher, runtime):
        with pytest.raises(DeadlineError):
            await submit(batcher, crop(1), time.monotonic() - 1)
        assert runtime.batches == []

    run(test)


def test_a_caller_who_leaves_frees_the_place_and_is_not_embedded():
    async def test(batcher, runtime):
        first = await blocked(batcher, runtime)
        leaving = asyncio.create_task(submit(batcher, crop(1)))
        await asyncio.sleep(0.02)
        leaving.cancel()
        await asyncio.sleep(0.02)
        staying = asyncio.create_task(submit(batcher, crop(2)))
        await asyncio.sleep(0.02)
        runtime.gate.set()
        await asyncio.gather(first, staying)
        assert runtime.batches == [1, 1]

    run(test, max_queue=2)


def test_a_poisoned_crop_fails_alone():
    async def test(batcher, runtime):
        first = await blocked(batcher, runtime)
        images = [crop(seed) for seed in range(1, 6)]
        images[2][0, 0, 0], images[3][0, 0, 0] = 255, 254
        tasks = [asyncio.create_task(submit(batcher, image)) for image in images]
        await asyncio.sleep(0.02)
        runtime.gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(one, ModelError) for one in found] == [False, False, True, True, False]
        await first
        await submit(batcher, crop(9))

    run(test)
