import asyncio
import threading
import time

import numpy as np
import pytest

from resight.errors import DeadlineError, ModelError, OverloadedError, ReIDError, UnavailableError
from resight.image import ImageSpec
from resight.runtime.base import DummyRuntime
from resight.service.inference.batcher import Batcher
from resight.service.inference.priority_queue import CropJob, Priority

SPEC = ImageSpec(height=16, width=16)
SOON, FAR = 30.0, 600.0


def crop(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, (16, 16, 3), dtype=np.uint8)


class GatedRuntime(DummyRuntime):
    """A dummy that waits for a gate and records batches; the first byte of a crop can make it fail or return NaN."""

    def __init__(self, max_batch: int = 8) -> None:
        super().__init__(SPEC, max_batch=max_batch)
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.batches: list[int] = []
        self.firsts: list[int] = []
        self.room = 1000
        self.pace_s = 0.0

    def embed(self, images):
        self.batches.append(len(images))
        self.firsts.append(int(images[0, 0, 0, 0]))
        self.started.set()
        assert self.gate.wait(SOON)
        time.sleep(self.pace_s)
        if len(images) > self.room:
            raise RuntimeError("CUDA failure 2: out of memory ; GPU=0")
        if (images[:, 0, 0, 0] == 255).any():
            raise RuntimeError("poison")
        features = super().embed(images)
        features[images[:, 0, 0, 0] == 254] = np.nan
        return features


class Submitting(Batcher):
    """A batcher with the part of the embedder that submits crops."""

    def __init__(self, runtime: GatedRuntime, **settings) -> None:
        super().__init__(self._finished_jobs, **settings)
        self.runtime, self.loop = runtime, asyncio.get_running_loop()

    def _finished_jobs(self, jobs):
        self.loop.call_soon_threadsafe(lambda: [job.future.done() or job.future.set_result(None) for job in jobs])

    async def submit(self, image, deadline=None, priority=Priority.INTERACTIVE, runtime=None):
        deadline = time.monotonic() + FAR if deadline is None else deadline
        with self.admit(1, deadline, priority):
            self.check(image.tobytes())
            job = CropJob(
                image.tobytes(), runtime or self.runtime, priority, deadline, self.loop.create_future(), image
            )
            self.expect([job])
            self.put(job)
            await job.future
        if isinstance(job.outcome, ReIDError):
            raise job.outcome
        return job.outcome


async def submit(batcher: Submitting, image: np.ndarray, deadline: float | None = None):
    return await batcher.submit(image, deadline)


def run(test, *, max_batch: int = 8, max_queue: int = 64):
    async def body():
        runtime = GatedRuntime(max_batch)
        batcher = Submitting(runtime, max_queue=max_queue, max_batch=max_batch)
        batcher.start()
        try:
            await asyncio.wait_for(test(batcher, runtime), SOON)
        finally:
            runtime.gate.set()
            await asyncio.to_thread(batcher.stop)

    asyncio.run(body())


async def blocked(batcher: Submitting, runtime: GatedRuntime) -> asyncio.Task:
    """Submit a first crop, which keeps the model busy until the gate opens."""
    runtime.gate.clear()
    task = asyncio.create_task(submit(batcher, crop(0)))
    await asyncio.to_thread(runtime.started.wait, SOON)
    return task


def test_each_caller_gets_the_feature_of_its_own_crop():
    async def test(batcher, runtime):
        images = [crop(seed) for seed in range(37)]
        found = await asyncio.gather(*(submit(batcher, image) for image in images))
        expected = DummyRuntime(SPEC).embed(np.stack(images))
        assert np.array_equal(np.stack(found), expected)
        assert sum(runtime.batches) == 37 and max(runtime.batches) <= 8

    run(test)


def test_crops_arriving_while_the_model_is_busy_form_one_batch():
    async def test(batcher, runtime):
        first = await blocked(batcher, runtime)
        others = [asyncio.create_task(submit(batcher, crop(seed))) for seed in range(1, 6)]
        await asyncio.sleep(0.02)
        runtime.gate.set()
        await asyncio.gather(first, *others)
        assert runtime.batches == [1, 5]

    run(test)


def test_a_full_queue_refuses_with_a_retry_delay():
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


def test_crops_that_expire_in_the_queue_are_not_embedded():
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


def test_calls_that_would_miss_their_deadline_are_refused():
    async def body(batcher, runtime):
        runtime.pace_s = 0.03
        for seed in range(12):  # so it learns how long a batch takes
            await submit(batcher, crop(seed))
        first = await blocked(batcher, runtime)
        took_s = batcher._admission.batch_s
        with pytest.raises(OverloadedError, match="longer than the deadline") as refused:
            await submit(batcher, crop(50), time.monotonic() + 1.5 * took_s)  # one ahead, and then its own
        assert refused.value.retry_after_s >= 1.9 * took_s
        patient = asyncio.create_task(submit(batcher, crop(51), time.monotonic() + SOON))
        await asyncio.sleep(0)
        runtime.gate.set()
        await asyncio.gather(first, patient)

    run(body)


def test_a_deadline_that_has_passed_is_not_admitted():
    async def test(batcher, runtime):
        with pytest.raises(DeadlineError):
            await submit(batcher, crop(1), time.monotonic() - 1)
        assert runtime.batches == []

    run(test)


def test_a_cancelled_call_frees_its_capacity_and_is_not_embedded():
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


def test_a_crop_that_failed_a_batch_is_quarantined():
    async def test(batcher, runtime):
        poison = crop(1)
        poison[0, 0, 0] = 255
        with pytest.raises(ModelError, match="failed on it"):
            await batcher.submit(poison)  # alone it may be the model that fails: it may come again
        with pytest.raises(ModelError, match="failed on it"):
            await batcher.submit(poison)
        first = await blocked(batcher, runtime)
        tasks = [asyncio.create_task(batcher.submit(image)) for image in (crop(2), poison, crop(3))]
        await asyncio.sleep(0.02)
        runtime.gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(one, ModelError) for one in found] == [False, True, False]
        await first
        runs = len(runtime.batches)
        with pytest.raises(ModelError, match="before"):
            await batcher.submit(poison)
        assert len(runtime.batches) == runs

    run(test)


@pytest.mark.parametrize("room, served", [(4, 8), (3, 0)])
def test_an_out_of_memory_batch_is_halved_once_and_the_queue_continues(room, served):
    async def test(batcher, runtime):
        first = await blocked(batcher, runtime)
        tasks = [asyncio.create_task(batcher.submit(crop(seed))) for seed in range(1, 9)]
        await asyncio.sleep(0.02)
        runtime.room = room
        runtime.gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(one, np.ndarray) for one in found) == served
        assert sum(isinstance(one, UnavailableError) for one in found) == 8 - served
        assert runtime.batches == [1, 8, 4, 4]
        await first
        await batcher.submit(crop(9))

    run(test)


def marked(value: int) -> np.ndarray:
    image = crop(value)
    image[0, 0, 0] = value
    return image


def test_calls_precede_enrolments_and_both_precede_a_migration():
    async def test(batcher, runtime):
        first = await blocked(batcher, runtime)
        order = [Priority.REEMBED, Priority.ENROL, Priority.INTERACTIVE]
        tasks = [
            asyncio.create_task(batcher.submit(marked(10 * priority + number), None, priority))
            for priority in order
            for number in range(3)
        ]
        await asyncio.sleep(0.02)
        batcher._queue.record_batch_time(Priority.REEMBED, 1.0)  # it had its turn just now
        runtime.gate.set()
        await asyncio.gather(first, *tasks)
        assert runtime.batches[:3] == [1, 4, 2] and sum(runtime.batches[3:]) == 3 and runtime.firsts[1:4] == [0, 11, 20]

    run(test, max_batch=4)


def test_an_idle_model_waits_a_limited_time_for_crops_being_decoded():
    async def test(batcher, runtime):
        await batcher.submit(crop(0))
        batcher._admission.batch_s = SOON / 3
        far = time.monotonic() + FAR
        jobs = [
            CropJob(b"", runtime, Priority.INTERACTIVE, far, batcher.loop.create_future(), crop(n)) for n in range(4)
        ]
        batcher.expect(jobs)
        for job in jobs[:2]:
            batcher.put(job)
        await asyncio.sleep(0.05)
        assert runtime.batches == [1]
        batcher.discard(jobs[2])
        batcher.put(jobs[3])
        await asyncio.gather(*(job.future for job in jobs if job is not jobs[2]))
        assert runtime.batches == [1, 3]
        batcher._admission.batch_s = 0.05
        batcher.expect(jobs[:1])  # and never comes
        await batcher.submit(crop(5))
        assert runtime.batches == [1, 3, 1]

    run(test)


def test_a_full_queue_refuses_only_its_priority():
    async def test(batcher, runtime):
        first = await blocked(batcher, runtime)
        enrolling = [asyncio.create_task(batcher.submit(crop(n), None, Priority.ENROL)) for n in range(2)]
        await asyncio.sleep(0.02)
        with pytest.raises(OverloadedError):
            await batcher.submit(crop(3), None, Priority.ENROL)
        caller = asyncio.create_task(batcher.submit(crop(4)))
        await asyncio.sleep(0.02)
        assert batcher.waiting() == {Priority.INTERACTIVE: 2, Priority.ENROL: 2, Priority.REEMBED: 0}
        runtime.gate.set()
        await asyncio.gather(first, caller, *enrolling)

    run(test, max_queue=2)


def test_two_models_alternate_and_never_share_a_batch():
    async def test(batcher, runtime):
        first = await blocked(batcher, runtime)
        other = GatedRuntime()
        tasks = [asyncio.create_task(batcher.submit(crop(n), runtime=(runtime, other)[n % 2])) for n in range(1, 9)]
        await asyncio.sleep(0.02)
        runtime.gate.set()
        await asyncio.gather(first, *tasks)
        assert runtime.batches == [1, 4] and other.batches == [4]

    run(test)


def test_waiting_jobs_fail_at_shutdown():
    async def test(batcher, runtime):
        first = await blocked(batcher, runtime)
        waiting = asyncio.create_task(batcher.submit(crop(1)))
        await asyncio.sleep(0.02)
        stopping = asyncio.create_task(asyncio.to_thread(batcher.stop))
        await asyncio.sleep(0.02)
        runtime.gate.set()
        await asyncio.gather(first, stopping)
        with pytest.raises(UnavailableError, match="shutting down"):
            await waiting

    run(test)
