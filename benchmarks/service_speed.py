"""Crops a second through the service against a bare onnxruntime loop, and what a search takes beside its parts."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
from load import EMBED, EMBED_BATCH, EMBED_STREAM, IN_FLIGHT, SEARCH, Load, LoadResult, put
from pieces import Bench, Row, Rows, fill, sure

from resight.arrays import Pixels
from resight.bundle.bundle import Bundle
from resight.image import decode, fit
from resight.runtime.onnx import session_options
from resight.v1 import search_pb2

GOALS = {"resnet50": 0.90, "osnet_x0_25": 0.80}  # of a bare onnxruntime loop at its best batch
BATCHES = (1, 8, 16, 32)
CORES = 2
BATCH = 8  # crops of a BatchEmbed
BATCHES_SEEN = 12  # of a measurement at least: calls end a batch at a time, so the count is right to one batch


class Bare:
    """onnxruntime in a loop, on ready pixels or with the decoding a service has to do.

    Attributes:
        of_batch: crops a second of each batch size, with onnxruntime's own options or the service's, whichever
            are faster.
        best: the fastest size.
    """

    def __init__(self, bundle: Bundle, jpegs: tuple[bytes, ...], seconds: float) -> None:
        own = ort.SessionOptions()
        own.intra_op_num_threads = CORES
        data = bundle.read("fp32", "onnx")
        self._spec, self._jpegs, self._seconds = bundle.manifest.image, jpegs, seconds
        self._pixels = np.stack([self._one(jpeg) for jpeg in jpegs])
        each_s, fastest = seconds / len(BATCHES), 0.0
        for options in (own, session_options(CORES)):
            session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
            rates = {batch: self._rate(session, batch, each_s) for batch in BATCHES}
            if max(rates.values()) > fastest:
                self._session, self.of_batch, fastest = session, rates, max(rates.values())
        self.best = max(self.of_batch, key=lambda batch: self.of_batch[batch])

    def _one(self, jpeg: bytes) -> Pixels:
        return fit(decode(jpeg), self._spec)

    def rate(self, *, decoding: bool = False) -> float:
        """Crops a second at the best size; with ``decoding`` in as many threads as cores, between inferences."""
        return self._rate(self._session, self.best, self._seconds, decoding=decoding)

    def long_enough(self) -> float:
        """Seconds of a measurement of calls."""
        return max(self._seconds, BATCHES_SEEN * max(BATCHES) / self.of_batch[self.best])

    def _rate(self, session: ort.InferenceSession, batch: int, seconds: float, *, decoding: bool = False) -> float:
        pixels = np.resize(self._pixels, (batch, *self._pixels.shape[1:]))
        jpegs = [self._jpegs[number % len(self._jpegs)] for number in range(batch)]
        session.run(None, {"images": pixels})
        done, started = 0, time.perf_counter()
        with ThreadPoolExecutor(CORES) as pool:
            while (passed := time.perf_counter() - started) < seconds:
                given = np.stack(list(pool.map(self._one, jpegs))) if decoding else pixels
                session.run(None, {"images": given})
                done += batch
        return done / passed


def embed(bench: Bench, backbones: tuple[str, ...]) -> Rows:
    """Embed and Search at 32 in flight against the bare loop; and the same crops by stream and in batches."""
    for backbone in backbones:
        bundle = bench.bundle(backbone)
        bare = Bare(bundle, bench.jpegs, bench.seconds)
        measured = ", ".join(f"batch {batch}: {rate:.1f}" for batch, rate in bare.of_batch.items())
        yield Row(f"bare onnxruntime, {backbone}", measured + " crops/s")
        with bench.serving(bundle, f"data-{backbone}") as (address, watch):
            fill(address, bundle, 1000)
            shared = {"seconds": bare.long_enough(), "warm_s": 1.0, "server_pid": watch.pid}
            loads = {
                f"Embed, {backbone}, {IN_FLIGHT} in flight": Load(address, EMBED, bench.embeds(), **shared),
                f"Search, {backbone}, {IN_FLIGHT} in flight": Load(address, SEARCH, bench.searches("bench"), **shared),
                f"StreamEmbed, {backbone}, {IN_FLIGHT} unanswered": Load(
                    address, EMBED_STREAM, bench.embed_streams(), stream=True, **shared
                ),
                f"BatchEmbed, {backbone}, {IN_FLIGHT // BATCH} calls of {BATCH} crops": Load(
                    address, EMBED_BATCH, bench.embed_batches(BATCH), in_flight=IN_FLIGHT // BATCH, **shared
                ),
            }
            cores: dict[str, str] = {}
            found: dict[str, list[float]] = {name: [] for name in ("bare", "decoding", *loads)}
            for _ in range(bench.rounds):
                found["bare"].append(bare.rate())
                found["decoding"].append(bare.rate(decoding=True))
                for name, load in loads.items():
                    outcome = sure(put(load))
                    found[name].append(outcome.rate * (BATCH if load.method == EMBED_BATCH else 1))
                    cores[name] = outcome.cores
        for name, load in loads.items():
            share, decoded = (
                statistics.median(a / b for a, b in zip(found[name], found[peer], strict=True))
                for peer in ("bare", "decoding")
            )
            goal = GOALS.get(backbone) if load.method in (EMBED, SEARCH) else None
            yield Row(
                name,
                f"{statistics.median(found[name]):.1f}/s, {share:.2f} of the bare loop at {bare.best}, "
                f"{decoded:.2f} of the loop that decodes; {cores[name]}",
                f">= {goal:.2f}" if goal else "",
                share >= goal if goal else None,
            )


def batching(bench: Bench, backbone: str = "resnet18") -> Rows:
    """Dynamic batching against batches of one, and what the cores themselves gain by batches."""
    bundle = bench.bundle(backbone)
    bare = Bare(bundle, bench.jpegs, bench.seconds)
    with (
        bench.serving(bundle, "data-one", max_batch="1") as (one, _),
        bench.serving(bundle, "data-many") as (many, _),
    ):
        requests = bench.embeds()
        gains = []
        for _ in range(bench.rounds):
            alone, together = (
                sure(put(Load(a, EMBED, requests, bare.long_enough(), warm_s=1.0))).rate for a in (one, many)
            )
            gains.append(together / alone)
    gain = statistics.median(gains)
    most = bare.of_batch[bare.best] / bare.of_batch[1]
    yield Row(f"batching, {backbone}, {IN_FLIGHT} in flight", f"{gain:.2f} times batches of one", ">= 3", gain >= 3)
    yield Row(f"the same for the bare loop ({bare.best} against 1)", f"{most:.2f}: all that these cores can gain")


def overhead(bench: Bench, backbone: str = "osnet_x0_25") -> Rows:
    """What Search takes beside decoding, inference and the index."""
    bundle = bench.bundle(backbone)
    with bench.serving(bundle, "data-overhead") as (address, _):
        fill(address, bundle, 1000)
        requests = bench.searches("bench")
        peak = sure(put(Load(address, SEARCH, requests, bench.seconds, warm_s=1.0))).rate
        lone = Load(address, SEARCH, requests, bench.seconds, warm_s=0.5, in_flight=1, keep=True)
        half = Load(address, SEARCH, requests, bench.seconds, warm_s=0.5, rate=peak / 2, keep=True)
        for name, load in (("one after the other", lone), (f"open loop at half the peak ({peak / 2:.0f}/s)", half)):
            rest, waited, whole = beside(sure(put(load)))
            p50 = statistics.median(rest)
            goal = ("<= 3 ms", p50 <= 3) if load is lone else ("", None)
            found = (
                f"{p50:.2f} ms of {statistics.median(whole):.2f}; {statistics.median(waited):.2f} ms of it in the queue"
            )
            yield Row(f"Search beside decode, inference and index, p50, {backbone}, {name}", found, *goal)


def beside(outcome: LoadResult) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds of each search: beside decode, inference and index; of that in the queue; in all."""
    rest, waited, whole = [], [], []
    for taken_s, answer in zip(outcome.good_s, outcome.answers, strict=True):
        timings = search_pb2.SearchResponse.FromString(answer).timings
        parts_ns = timings.decode_ns + timings.infer_ns + timings.search_ns
        rest.append(taken_s * 1e3 - parts_ns / 1e6)
        waited.append(timings.queue_ns / 1e6)
        whole.append(taken_s * 1e3)
    return rest, waited, whole
