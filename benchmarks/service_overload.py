"""Ten times what the service can do: how fast it refuses, what it still does, and whether it keeps its memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from load import EMBED, Load, put
from pieces import Bench, Row, Rows, ServerWatch, sure

TIMES = 10
PATIENCE_S = 2.0  # the callers' deadline: what would wait longer is refused at once
CONNECTIONS = 16  # a server refuses what is over a hundred calls of one connection before it looks at them
WARM_S = 3.0  # until the queue is as full as it gets
LOOK_S = 0.25
GROWTH = 1.1  # flat: a tenth at most


@contextmanager
def _memory(watch: ServerWatch) -> Iterator[list[int]]:
    """Resident bytes, looked at while the block runs."""
    seen, done = [], threading.Event()

    def look() -> None:
        while not done.wait(LOOK_S):
            seen.append(watch.resident())

    looker = threading.Thread(target=look)
    looker.start()
    try:
        yield seen
    finally:
        done.set()
        looker.join()


def overload(bench: Bench, backbones: tuple[str, ...]) -> Rows:
    """Open loop at ten times the peak."""
    for backbone in backbones:
        bundle = bench.bundle(backbone)
        with bench.serving(bundle, f"data-overload-{backbone}") as (address, watch):
            requests = bench.embeds()
            peak = sure(put(Load(address, EMBED, requests, bench.seconds, warm_s=1.0, in_flight=64))).rate
            load = Load(
                address, EMBED, requests, 2 * bench.seconds, WARM_S,
                rate=TIMES * peak, connections=CONNECTIONS, deadline_s=PATIENCE_S, server_pid=watch.pid,
            )  # fmt: skip
            with _memory(watch) as seen:
                outcome = put(load)
            again = sure(put(Load(address, EMBED, requests, bench.seconds, warm_s=1.0, in_flight=64))).rate
        half = len(seen) // 2
        growth = max(seen[half:]) / max(seen[:half])
        refused_ms = float(np.percentile(outcome.refused_s, 99)) * 1e3 if outcome.refused_s else float("nan")
        good = outcome.rate / peak
        name = f"{TIMES}x overload ({load.rate:.0f}/s), {backbone}"
        found = f"{refused_ms:.1f} ms; {len(outcome.refused_s) / outcome.wall_s:.0f}/s refused; calls were sent up to "
        yield Row(f"{name}: refusals p99", found + f"{outcome.late_s * 1e3:.0f} ms late", "< 20 ms", refused_ms < 20)
        found = (
            f"{good:.2f} of the peak of {peak:.1f}/s; afterwards {again / peak:.2f}; ended as {dict(outcome.codes)}; "
        )
        found += outcome.cores
        yield Row(f"{name}: goodput", found, ">= 0.90", good >= 0.9)
        found = f"{max(seen) / 2**20:.0f} MiB, second half {growth:.2f} of the first"
        yield Row(f"{name}: memory", found, f"<= {GROWTH}", growth <= GROWTH)
