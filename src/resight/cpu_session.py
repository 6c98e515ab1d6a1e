"""A graph on all the cores of a CPU: a batch in parts, each computed by one core.

Onnxruntime shares every operator of a run among its threads, and they meet after each: waiting asleep costs small
operators more than their work, and waiting awake (spinning) takes the cores that decoding and gRPC need. Parts of a
batch never meet. OSNet x0.25 at 32 crops on two idle cores: 712 crops/s with threads asleep, 794 with threads
spinning, 825 in parts, with the least processor time a crop; ResNet-50 27 in each way.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from resight.graph_check import INPUT, OUTPUT
from resight.image import Pixels

Features = NDArray[np.float32]
"""float32 (N, D), unit rows."""

PROVIDER = "CPUExecutionProvider"
WORTH = 0.8  # of the time of one core: below it a second session for batches too small to part pays for its weights
TRIALS = 5


class CpuSession:
    """One graph in onnxruntime.

    Batches of ``threads`` crops or more go in parts to a session that computes in the calling thread. Smaller ones
    would leave cores idle: they go to a second session that shares its operators among all cores, where that is
    faster (ResNet-50: 38 ms a crop instead of 76) and not slower (OSNet x0.25: 2.5 ms instead of 2.3).

    Args:
        data: serialised ONNX, checked.
        threads: cores to use; 0 = all that this process may use.
    """

    def __init__(self, data: bytes, threads: int = 0) -> None:
        self._threads = threads = threads or len(os.sched_getaffinity(0))
        self._alone = open_session(data, 1)
        self._together = self._alone
        self._beside, self._lock = 0, Lock()  # callers of `run_beside` within it
        if threads > 1:
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="core")
            together = open_session(data, threads)
            crop = np.zeros((1, *self._alone.get_inputs()[0].shape[1:]), np.uint8)
            if _lone_s(together, crop) < WORTH * _lone_s(self._alone, crop):
                self._together = together

    def run(self, images: Pixels) -> Features:
        """Features, float32 (N, D), of uint8 (N, H, W, 3)."""
        if len(images) < self._threads or self._threads == 1:
            return _run(self._together, images)
        parts = np.array_split(images, self._threads)
        return np.concatenate(list(self._pool.map(lambda part: _run(self._alone, part), parts)))

    def run_beside(self, images: Pixels) -> Features:
        """As `run`, on one core: for a caller that has a thread for each. A lone crop still gets idle cores."""
        with self._lock:
            self._beside += 1
            idle = self._beside == 1
        try:
            return _run(self._together if idle and len(images) < self._threads else self._alone, images)
        finally:
            with self._lock:
                self._beside -= 1


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
