"""The token bucket compared with manual counts."""

import random

import pytest

from resight.errors import RateLimitedError
from resight.service.access import interceptors as module
from resight.service.access.auth import Principal, Role
from resight.service.access.interceptors import RateLimit

ANNA, BOB = Principal("anna", "default", Role.READER), Principal("bob", "default", Role.READER)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_burst_then_rate_per_principal():
    clock = Clock()
    limit = RateLimit(2.0, 3, clock=clock)
    for _ in range(3):
        limit.take(ANNA)
    with pytest.raises(RateLimitedError, match="2 calls per second, with bursts of 3") as refused:
        limit.take(ANNA)
    assert refused.value.retry_after_s == pytest.approx(0.5) and refused.value.facts["principal"] == "anna"
    limit.take(BOB)
    clock.now += refused.value.retry_after_s
    limit.take(ANNA)
    with pytest.raises(RateLimitedError):
        limit.take(ANNA)


def test_the_same_name_in_two_tenants_is_limited_separately():
    limit = RateLimit(0.1, 1, clock=Clock())
    limit.take(ANNA)
    limit.take(Principal("anna", "north", Role.READER))


def test_never_more_than_burst_and_rate_allow():
    clock, rng = Clock(), random.Random(3)
    limit, allowed = RateLimit(5.0, 4, clock=clock), []
    for _ in range(3000):
        clock.now += rng.expovariate(20.0)
        try:
            limit.take(ANNA)
        except RateLimitedError as error:
            assert 0 < error.retry_after_s <= 0.2
        else:
            allowed.append(clock.now)
    for start in range(0, len(allowed), 50):  # any window of t seconds holds at most burst + rate t
        for end in range(start, len(allowed)):
            assert end - start + 1 <= 4 + 5.0 * (allowed[end] - allowed[start]) + 1e-6
    assert len(allowed) == pytest.approx(4 + 5.0 * (clock.now - 100.0), rel=0.02)


def test_the_memory_of_many_principals_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "MAX_PRINCIPALS", 10)
    limit = RateLimit(1.0, 1, clock=Clock())
    for number in range(50):
        limit.take(Principal(f"p{number}", "default", Role.READER))
    with pytest.raises(RateLimitedError):
        limit.take(Principal("p49", "default", Role.READER))
    limit.take(Principal("p0", "default", Role.READER))
    assert len(limit._buckets) == 10
