import asyncio

import pytest

from resight.runtime.base import DummyRuntime
from resight.service.inference.priority_queue import (
    CALLERS_GONE_S,
    PRIORITY_SHARES,
    QUIET_S,
    CropJob,
    CropQueue,
    Priority,
)

CALLER, ENROL, REEMBED = Priority
MOST = 1000  # crops: as many as the model takes


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def answer():
    loop = asyncio.new_event_loop()
    yield loop.create_future()
    loop.close()


def waiting(lanes: CropQueue, runtime, answer, priority: Priority, count: int) -> None:
    for _ in range(count):
        lanes.put(CropJob(b"", runtime, priority, 0.0, answer))


def taken(lanes: CropQueue) -> list[CropJob]:
    """The next batch, which ends at once."""
    batch = lanes.take(MOST)
    lanes.finish_batch(batch)
    return batch


@pytest.mark.parametrize("low", [ENROL, REEMBED])
def test_each_lower_priority_gets_its_share_under_load(answer, low):
    clock, runtime, took = Clock(), DummyRuntime(max_batch=8), {CALLER: 0.0, low: 0.0}
    lanes = CropQueue(clock)
    for _ in range(3000):
        waiting(lanes, runtime, answer, CALLER, 16)
        waiting(lanes, runtime, answer, low, 1)
        batch = taken(lanes)
        priority = batch[0].priority
        seconds = 0.001 * len(batch)
        clock.now += seconds
        took[priority] += seconds
        lanes.record_batch_time(priority, seconds)
    share = took[low] / sum(took.values())
    assert 0.8 * PRIORITY_SHARES[low] < share < 1.3 * PRIORITY_SHARES[low] + 0.05


def test_a_migration_waits_during_calls_and_its_batches_stay_short(answer):
    clock, runtime = Clock(), DummyRuntime(max_batch=32)
    lanes = CropQueue(clock)
    assert lanes.wait_s() is None and lanes.take(MOST) == []
    waiting(lanes, runtime, answer, REEMBED, 100)
    assert lanes.wait_s() == 0 and len(taken(lanes)) == 4  # nothing is known yet
    lanes.record_batch_time(REEMBED, 0.0002, 4)  # 5 ms are 100 crops of 50 us, a batch has 32
    lanes.defer_background()
    assert 0 < lanes.wait_s() <= QUIET_S and lanes.take(MOST) == []
    clock.now += QUIET_S
    assert lanes.wait_s() == 0 and len(taken(lanes)) == 32
    lanes.record_batch_time(REEMBED, 0.032, 32)  # 1 ms each
    for _ in range(500):  # a caller in a loop, back before it is quiet
        lanes.defer_background()
        clock.now += 0.001
    assert len(taken(lanes)) == 5
    lanes.record_batch_time(REEMBED, 5.0, 5)  # a slow model still moves
    clock.now += QUIET_S
    assert len(taken(lanes)) == 1
    assert len(lanes.drain()) == 58 and lanes.wait_s() is None


def test_a_migration_leaves_a_worker_free_until_there_are_no_calls(answer):
    clock, runtime = Clock(), DummyRuntime(max_batch=32)
    lanes = CropQueue(clock)
    lanes.defer_background()
    clock.now += QUIET_S
    waiting(lanes, runtime, answer, REEMBED, 12)
    first = lanes.take(MOST)
    assert len(first) == 4 and lanes.take(MOST) == [] and lanes.wait_s() == pytest.approx(CALLERS_GONE_S - QUIET_S)
    clock.now += CALLERS_GONE_S
    assert lanes.wait_s() == 0 and len(lanes.take(MOST)) == 4
    lanes.defer_background()
    waiting(lanes, runtime, answer, CALLER, 8)
    assert [job.priority for job in lanes.take(3)] == [CALLER] * 3 and len(lanes.take(MOST)) == 5
    clock.now += QUIET_S
    assert lanes.take(MOST) == []
    lanes.finish_batch(first)
    lanes.finish_batch(first)
    assert len(lanes.take(MOST)) == 4
