import asyncio

import pytest

from resight.service.lanes import QUIET_S, SHARE, Job, Lanes, Priority
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


def test_a_migration_waits_while_callers_come_and_takes_no_longer_at_once_than_they_may_wait(answer):
    clock, runtime = Clock(), DummyRuntime(max_batch=32)
    lanes = Lanes(clock)
    assert lanes.wait_s() is None and lanes.take() == []
    waiting(lanes, runtime, answer, REEMBED, 100)
    assert lanes.wait_s() == 0 and len(lanes.take()) == 4  # nothing is known yet
    lanes.ran(REEMBED, 0.0002, 4)  # 5 ms are 100 crops of 50 us, a batch has 32
    lanes.hold_back()
    assert 0 < lanes.wait_s() <= QUIET_S and lanes.take() == []
    clock.now += QUIET_S
    assert lanes.wait_s() == 0 and len(lanes.take()) == 32
    lanes.ran(REEMBED, 0.032, 32)  # 1 ms each
    for _ in range(500):  # a caller in a loop, back before it is quiet
        lanes.hold_back()
        clock.now += 0.001
    assert len(lanes.take()) == 5
    lanes.ran(REEMBED, 5.0, 5)  # a slow model still moves
    clock.now += QUIET_S
    assert len(lanes.take()) == 1
    assert len(lanes.drain()) == 58 and lanes.wait_s() is None
