"""A load on a gRPC server from a process of its own: requests made beforehand, answers not parsed while it runs.

Either so many calls are held in flight, or calls are sent at a rate, whether or not the earlier ones were answered
(open loop; a call's time then counts from when it was due).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

EMBED = "/resight.v1.EmbeddingService/Embed"
EMBED_BATCH = "/resight.v1.EmbeddingService/BatchEmbed"
EMBED_STREAM = "/resight.v1.EmbeddingService/StreamEmbed"
SEARCH = "/resight.v1.SearchService/Search"
ENROL_BATCH = "/resight.v1.GalleryService/BatchEnrollEntries"
TICKS = os.sysconf("SC_CLK_TCK")
BYTES = 64 * 1024 * 1024
IN_FLIGHT = 32
TICK_S = 0.002  # between looks at what is due; below it the loop does nothing else


@dataclass(frozen=True)
class Load:
    """What to send.

    Attributes:
        address: ``HOST:PORT``.
        method: full name, with slashes.
        requests: serialised, sent in turn.
        seconds: how long to begin calls; 0 = until each request was sent once.
        warm_s: before anything counts.
        connections: calls take turns on them; a server refuses streams of one connection that has too many.
        in_flight: calls held.
        rate: calls a second instead; 0 = hold ``in_flight``.
        deadline_s: of each call.
        keep: bring the answers back.
        server_pid: of the process whose processor time is looked at; 0 = none.
        stream: requests go over one stream of both directions, ``in_flight`` of them unanswered; ``seconds`` is set.
    """

    address: str
    method: str
    requests: Sequence[bytes]
    seconds: float = 0.0
    warm_s: float = 0.0
    connections: int = 1
    in_flight: int = IN_FLIGHT
    rate: float = 0.0
    deadline_s: float = 60.0
    keep: bool = False
    server_pid: int = 0
    stream: bool = False


@dataclass
class LoadResult:
    """What came back of the time that counts.

    Attributes:
        wall_s: that time.
        good_s: seconds each answered call took.
        refused_s: seconds until each refusal (RESOURCE_EXHAUSTED).
        codes: how calls ended.
        errors: message of the first call of each other status code.
        client_cpu_s: processor time of this process.
        server_cpu_s: processor time of the server.
        late_s: the latest a call was sent after it was due.
        answers: serialised, where asked for, in the order of ``good_s``.
    """

    wall_s: float = 0.0
    good_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    errors: dict[str, str] = field(default_factory=dict)
    client_cpu_s: float = 0.0
    server_cpu_s: float = 0.0
    late_s: float = 0.0
    answers: list[bytes] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answered calls a second."""
        return len(self.good_s) / self.wall_s

    @property
    def cores(self) -> str:
        """Cores both took."""
        return f"client {self.client_cpu_s / self.wall_s:.2f} cores, server {self.server_cpu_s / self.wall_s:.2f}"


def cpu_s(pid: int) -> float:
    """Processor seconds a process has taken; 0 for none."""
    if not pid:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS  # utime, stime: fields 14 and 15 of proc(5)


class _Sender:
    """Sends one load. Everything before ``counts_from`` is forgotten."""

    def __init__(self, load: Load, channels: Sequence[grpc.aio.Channel]) -> None:
        self._load, self._heard, self._number = load, LoadResult(), 0
        # No serialisers: bytes go in and come out.
        self._calls: list[Callable[..., Any]] = [
            (one.stream_stream if load.stream else one.unary_unary)(load.method, None, None) for one in channels
        ]
        self._counts_from = 0.0

    async def run(self) -> LoadResult:
        load = self._load
        begun = time.perf_counter()
        self._counts_from, until = begun + load.warm_s, begun + load.warm_s + load.seconds
        way = self._flow(until) if load.stream else self._pace(begun, until) if load.rate else self._hold(until)
        sending = asyncio.create_task(way)
        await asyncio.sleep(max(0.0, self._counts_from - time.perf_counter()))
        before = cpu_s(os.getpid()), cpu_s(load.server_pid)
        if load.seconds:
            await asyncio.sleep(until - time.perf_counter())
            self._stop(*before)
            await sending
        else:
            await sending
            self._stop(*before)
        return self._heard

    def _stop(self, client_cpu_s: float, server_cpu_s: float) -> None:
        """Freeze the figures: what is answered later does not count."""
        outcome = self._heard
        outcome.wall_s = time.perf_counter() - self._counts_from
        outcome.client_cpu_s = cpu_s(os.getpid()) - client_cpu_s
        outcome.server_cpu_s = cpu_s(self._load.server_pid) - server_cpu_s

    async def _hold(self, until: float) -> None:
        async def caller() -> None:
            while time.perf_counter() < until if self._load.seconds else self._number < len(self._load.requests):
                await self._one(time.perf_counter())

        await asyncio.gather(*(caller() for _ in range(self._load.in_flight)))

    async def _flow(self, until: float) -> None:
        """One stream; an answer's time counts from when the oldest unanswered request was sent."""
        room, sent = asyncio.Semaphore(self._load.in_flight), collections.deque[float]()
        call = self._calls[0](timeout=self._load.deadline_s)

        async def write() -> None:
            while time.perf_counter() < until:
                await room.acquire()
                sent.append(time.perf_counter())
                await call.write(self._load.requests[self._number % len(self._load.requests)])
                self._number += 1
            await call.done_writing()

        writing = asyncio.create_task(write())
        async for _ in call:
            room.release()
            begun, ended = sent.popleft(), time.perf_counter()
            if ended >= self._counts_from and not self._heard.wall_s:
                self._heard.codes["OK"] += 1
                self._heard.good_s.append(ended - begun)
        await writing

    async def _pace(self, begun: float, until: float) -> None:
        flying: set[asyncio.Task[None]] = set()
        sent, load = 0, self._load
        while (now := time.perf_counter()) < until:
            while (due := begun + sent / load.rate) <= now:
                task = asyncio.create_task(self._one(due))
                flying.add(task)
                task.add_done_callback(flying.discard)
                sent += 1
            await asyncio.sleep(TICK_S)
        await asyncio.gather(*flying)

    async def _one(self, due: float) -> None:
        load, outcome = self._load, self._heard
        request = load.requests[self._number % len(load.requests)]
        call = self._calls[self._number % len(self._calls)]
        self._number += 1
        late_s = time.perf_counter() - due
        code, answer, details = "OK", b"", ""
        try:
            answer = await call(request, timeout=load.deadline_s)
        except grpc.aio.AioRpcError as error:
            code, details = error.code().name, error.details() or ""
        ended = time.perf_counter()
        if ended < self._counts_from or outcome.wall_s:  # by its end, or answers that take 2 s would miss the first 2 s
            return
        outcome.codes[code] += 1
        outcome.errors.setdefault(code, details)
        outcome.late_s = max(outcome.late_s, late_s)
        if code == "OK":
            outcome.good_s.append(ended - due)
            if load.keep:
                outcome.answers.append(answer)
        elif code == "RESOURCE_EXHAUSTED":
            outcome.refused_s.append(ended - due)


async def _run(load: Load) -> LoadResult:
    options = [
        ("grpc.max_receive_message_length", BYTES),
        ("grpc.max_send_message_length", BYTES),
        ("grpc.use_local_subchannel_pool", 1),  # or all channels would share one connection
    ]
    async with contextlib.AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(load.address, options=options))
            for _ in range(load.connections)
        ]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        return await _Sender(load, channels).run()


def put(load: Load) -> LoadResult:
    """Run a load in a process of its own, which imports nothing but this, and return what it outcome."""
    done = subprocess.run([sys.executable, __file__], input=pickle.dumps(vars(load)), stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit("the load's process failed, see above")
    return LoadResult(**pickle.loads(done.stdout))


if __name__ == "__main__":
    load = Load(**pickle.load(sys.stdin.buffer))
    sys.stdout.buffer.write(pickle.dumps(vars(asyncio.run(_run(load)))))
