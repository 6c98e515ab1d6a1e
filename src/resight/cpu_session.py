"""A graph on all the cores of a CPU: a few crops at a time on each core.

Onnxruntime shares every operator of a run among its threads, and they meet after each: waiting asleep costs small
operators more than their work, and waiting awake (spinning) takes the cores that decoding and gRPC need. Runs of one
thread never meet, and a run of few crops stays in its core's cache. OSNet x0.25 on two idle cores: 712 crops/s in
batches of 32 with threads asleep, 794 with threads spinning; with a run on each core 781 in batches of 16, 843 in
batches of 4 and 872 one by one. ResNet-50 27 to 29 in each way.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from resight.graph_check import INPUT, OUTPUT
from resight.image import Pixels
from resight.machine import cores

Features = NDArray[np.float32]
"""float32 (N, D), unit rows."""

PROVIDER = "CPUExecutionProvider"
WORTH = 0.8  # of the time of one core: below it a second session for batches too small to part pays for its weights
TRIALS = 5
PER_CORE = 4  # crops of a run: within 3 % of the fastest size of OSNet x0.25, ResNet-18 and ResNet-50


class CpuSession:
    """One graph in onnxruntime.

    Up to `PER_CORE` crops are computed in the calling thread; more go in such parts to all cores. Fewer crops than
    cores would leave some idle: if nobody else is here they go to a second session that shares its operators among
    all cores, where that is faster (ResNet-50: 38 ms a crop instead of 76) and not slower (OSNet x0.25: 2.5 ms instead
    of 2.3). Any thread may call.

    Args:
        data: serialised ONNX, checked.
        threads: cores to use; 0 = all that this process may use.
    """

    def __init__(self, data: bytes, threads: int = 0) -> None:
        self._threads = threads = threads or cores()
        self._alone = open_session(data, 1)
        self._together = self._alone
        self._callers, self._lock = 0, Lock()  # within `run`
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="core")
        if threads > 1:
            together = open_session(data, threads)
            crop = np.zeros((1, *self._alone.get_inputs()[0].shape[1:]), np.uint8)
            if _lone_s(together, crop) < WORTH * _lone_s(self._alone, crop):
                self._together = together

    def run(self, images: Pixels) -> Features:
        """Features, float32 (N, D), of uint8 (N, H, W, 3)."""
        with self._lock:
            self._callers += 1
            idle = self._callers == 1
        try:
            if len(images) <= PER_CORE:
                return _run(self._together if idle and len(images) < self._threads else self._alone, images)
            parts = np.array_split(images, -(-len(images) // PER_CORE))
            return np.concatenate(list(self._pool.map(lambda part: _run(self._alone, part), parts)))
        finally:
            with self._lock:
                self._callers -= 1


def open_session(data: bytes, threads: int) -> ort.InferenceSession:
    """A session on the CPU; onnxruntime's own exceptions come through."""
    return ort.InferenceSession(data, session_options(threads), providers=[PROVIDER])


def session_options(threads: int) -> ort.SessionOptions:
    """How onnxruntime runs a graph beside a service on the same cores; figures by `benchmarks/bench_session.py`.

    Args:
        threads: of one run; 1 = the calling thread.
    """
    options = ort.SessionOptions()
    # Given as a number, even where it is onnxruntime's own: left at 0 it also pins each thread to a core (its page
    # "Thread management"), where it waits for whatever of the service runs there.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # A pattern is planned and kept for every shape, and a batcher makes max_batch of them: the peak of OSNet x0.25
    # was 182 MiB with patterns and 123 MiB without, at the same speed. The arena itself stays: without it each run
    # asks the system anew (RSS 139 MiB, no faster); after the warm-up it grew by 2 MiB, so nothing is shrunk.
    options.enable_cpu_mem_arena = True
    options.enable_mem_pattern = False
    # Threads that spin for work took 1.6-1.9 times the CPU time per crop; decoding and gRPC on these cores want it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors: its warnings are about graphs, and a user of a bundle writes none
    return options


def _run(session: ort.InferenceSession, images: Pixels) -> Features:
    features: Features = session.run([OUTPUT], {INPUT: images})[0]
    return features


def _lone_s(session: ort.InferenceSession, crop: Pixels) -> float:
    """Seconds of a lone crop: the best of a few, since whatever else runs only adds to them."""
    _run(session, crop)  # allocates
    best = float("inf")
    for _ in range(TRIALS):
        started = time.perf_counter()
        _run(session, crop)
        best = min(best, time.perf_counter() - started)
    return best
