import asyncio

import pytest

from resight.service.lanes import QUIET_S, REEMBED_BATCH, SHARE, Job, Lanes, Priority
from resight.service.runtime import DummyRuntime

CALLER, ENROL, REEMBED = Priority


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def answer():
    loop = asyncio.new_event_loop()
    yield loop.create_future()
    loop.close()


def waiting(lanes: Lanes, runtime, answer, priority: Priority, count: int) -> None:
    for _ in range(count):
        lanes.put(Job(b"", runtime, priority, 0.0, answer))


@pytest.mark.parametrize("low", [ENROL, REEMBED])
def test_a_flood_of_callers_leaves_each_lower_priority_its_share(answer, low):
    clock, runtime, took = Clock(), DummyRuntime(max_batch=8), {CALLER: 0.0, low: 0.0}
    lanes = Lanes(clock)
    for _ in range(3000):
        waiting(lanes, runtime, answer, CALLER, 16)
        waiting(lanes, runtime, answer, low, 1)
        batch = lanes.take()
        priority = batch[0].priority
        seconds = 0.001 * len(batch)
        clock.now += seconds
        took[priority] += seconds
        lanes.ran(priority, seconds)
    share = took[low] / sum(took.values())
    assert 0.8 * SHARE[low] < share < 1.3 * SHARE[low] + 0.05


def test_a_migration_waits_while_callers_come_and_runs_in_full_batches_when_none_does(answer):
    clock, runtime = Clock(), DummyRuntime(max_batch=32)
    lanes = Lanes(clock)
    assert lanes.wait_s() is None and lanes.take() == []
    waiting(lanes, runtime, answer, REEMBED, 100)
    assert lanes.wait_s() == 0 and len(lanes.take()) == 32
    lanes.ran(REEMBED, 0.1)
    lanes.hold_back()
    assert lanes.wait_s() == pytest.approx(QUIET_S) and lanes.take() == []
    clock.now += QUIET_S
    assert lanes.wait_s() == 0 and len(lanes.take()) == 32
    lanes.ran(REEMBED, 0.001)
    for _ in range(16):  # a caller in a loop, back before it is quiet
        lanes.hold_back()
        clock.now += 0.001
    assert len(lanes.take()) == REEMBED_BATCH
    assert len(lanes.drain()) == 32 and lanes.wait_s() is None
