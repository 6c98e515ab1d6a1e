"""The shares of priorities, and how migrations give way to calls."""

import asyncio

import pytest

from resight.runtime.base import DummyRuntime
from resight.service.inference.priority_queue import (
    NO_CALLS_S,
    PRIORITY_SHARES,
    QUIET_S,
    CropJob,
    CropQueue,
    Priority,
)

INTERACTIVE, ENROL, REEMBED = Priority
MAX_CROPS = 1000  # more than the model takes


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def answer():
    loop = asyncio.new_event_loop()
    yield loop.create_future()
    loop.close()


def put_jobs(queue: CropQueue, runtime, answer, priority: Priority, count: int) -> None:
    for _ in range(count):
        queue.put(CropJob(b"", runtime, priority, 0.0, answer))


def take_and_finish(queue: CropQueue) -> list[CropJob]:
    """Take the next batch and finish it at once."""
    batch = queue.take(MAX_CROPS)
    queue.finish_batch(batch)
    return batch


@pytest.mark.parametrize("low", [ENROL, REEMBED])
def test_each_lower_priority_gets_its_share_under_load(answer, low):
    clock, runtime, took = Clock(), DummyRuntime(max_batch=8), {INTERACTIVE: 0.0, low: 0.0}
    queue = CropQueue(clock)
    for _ in range(3000):
        put_jobs(queue, runtime, answer, INTERACTIVE, 16)
        put_jobs(queue, runtime, answer, low, 1)
        batch = take_and_finish(queue)
        priority = batch[0].priority
        seconds = 0.001 * len(batch)
        clock.now += seconds
        took[priority] += seconds
        queue.record_batch_time(priority, seconds)
    share = took[low] / sum(took.values())
    assert 0.8 * PRIORITY_SHARES[low] < share < 1.3 * PRIORITY_SHARES[low] + 0.05


def test_a_migration_waits_during_calls_and_its_batches_stay_short(answer):
    clock, runtime = Clock(), DummyRuntime(max_batch=32)
    queue = CropQueue(clock)
    assert queue.wait_s() is None and queue.take(MAX_CROPS) == []
    put_jobs(queue, runtime, answer, REEMBED, 100)
    assert queue.wait_s() == 0 and len(take_and_finish(queue)) == 4  # the duration is not known yet
    queue.record_batch_time(REEMBED, 0.0002, 4)  # 5 ms are 100 crops of 50 us, a batch has 32
    queue.defer_background()
    assert 0 < queue.wait_s() <= QUIET_S and queue.take(MAX_CROPS) == []
    clock.now += QUIET_S
    assert queue.wait_s() == 0 and len(take_and_finish(queue)) == 32
    queue.record_batch_time(REEMBED, 0.032, 32)  # 1 ms each
    for _ in range(500):  # a client in a loop, back within QUIET_S
        queue.defer_background()
        clock.now += 0.001
    assert len(take_and_finish(queue)) == 5
    queue.record_batch_time(REEMBED, 5.0, 5)  # a slow model makes progress too
    clock.now += QUIET_S
    assert len(take_and_finish(queue)) == 1
    assert len(queue.drain()) == 58 and queue.wait_s() is None


def test_a_migration_leaves_a_worker_free_until_there_are_no_calls(answer):
    clock, runtime = Clock(), DummyRuntime(max_batch=32)
    queue = CropQueue(clock)
    queue.defer_background()
    clock.now += QUIET_S
    put_jobs(queue, runtime, answer, REEMBED, 12)
    first = queue.take(MAX_CROPS)
    assert len(first) == 4 and queue.take(MAX_CROPS) == [] and queue.wait_s() == pytest.approx(NO_CALLS_S - QUIET_S)
    clock.now += NO_CALLS_S
    assert queue.wait_s() == 0 and len(queue.take(MAX_CROPS)) == 4
    queue.defer_background()
    put_jobs(queue, runtime, answer, INTERACTIVE, 8)
    assert [job.priority for job in queue.take(3)] == [INTERACTIVE] * 3 and len(queue.take(MAX_CROPS)) == 5
    clock.now += QUIET_S
    assert queue.take(MAX_CROPS) == []
    queue.finish_batch(first)
    queue.finish_batch(first)
    assert len(queue.take(MAX_CROPS)) == 4
