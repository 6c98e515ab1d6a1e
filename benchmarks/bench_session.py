"""How onnxruntime's session options change speed, CPU time and memory beside a service: one process for each.

Each row runs the same graph in a process of its own, the rows in turn and several rounds, and prints medians:
crops a second and CPU milliseconds a crop over batches of random size (what a batcher makes), milliseconds and CPU
milliseconds of a lone crop every 5 ms, crops and JPEGs a second when a decoding thread shares the cores, and the
memory the runs added to the loaded model. The first row is what `resight.runtime.onnx` sets.

    python benchmarks/bench_session.py [--onnx FILE] [--seconds 1] [--rounds 3]
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image

from resight.arrays import Pixels
from resight.bundle.probes import draw_jpegs
from resight.runtime.onnx import CpuSession, session_options

MAX_BATCH = 32
LONE = 60  # lone crops
ROWS: dict[str, dict[str, str]] = {
    "as served: in parts": {},
    "threads asleep": {"session.intra_op.allow_spinning": "0"},
    "spinning": {"session.intra_op.allow_spinning": "1"},
    "spinning 50 us": {"session.intra_op.allow_spinning": "1", "session.intra_op.spin_duration_us": "50"},
    "memory patterns": {"enable_mem_pattern": "1"},
    "no arena": {"enable_cpu_mem_arena": "0"},
    "denormals as zero": {"session.set_denormal_as_zero": "1"},
    "pinned threads": {"intra_op_num_threads": "0"},
    "one thread": {"intra_op_num_threads": "1"},
}


def resident_mib() -> float:
    """Memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def measure(path: str, changed: dict[str, str], seconds: float) -> dict[str, float]:
    """One row, in this process."""
    ort.set_default_logger_severity(3)  # it warns of each option given twice
    options = session_options(len(os.sched_getaffinity(0)))
    for name, value in changed.items():
        if hasattr(options, name):
            setattr(options, name, int(value))
        else:
            options.add_session_config_entry(name, value)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    _, height, width, _ = session.get_inputs()[0].shape
    rng = np.random.default_rng(0)
    crops = rng.integers(0, 256, (MAX_BATCH, height, width, 3), dtype=np.uint8)
    loaded = resident_mib()

    def infer(images: Pixels) -> None:
        session.run(None, {"images": images})

    if not changed:
        infer = CpuSession(Path(path).read_bytes()).run
    infer(crops)
    found: dict[str, float] = {}

    def run(sizes: list[int]) -> tuple[float, float]:
        done, started, cpu = 0, time.perf_counter(), time.process_time()
        for size in itertools.cycle(sizes):
            infer(crops[:size])
            done += size
            if (passed := time.perf_counter() - started) > seconds:
                return done / passed, 1e3 * (time.process_time() - cpu) / done
        raise AssertionError

    sizes = rng.integers(1, MAX_BATCH + 1, 1000).tolist()
    found["crops/s"], found["CPU ms"] = run(sizes)
    waits, cpu = [], time.process_time()
    for _ in range(LONE):
        started = time.perf_counter()
        infer(crops[:1])
        waits.append(1e3 * (time.perf_counter() - started))
        time.sleep(0.005)
    found["lone ms"], found["lone CPU ms"] = statistics.median(waits), 1e3 * (time.process_time() - cpu) / LONE

    jpeg, ended, decoded = draw_jpegs(count=1)[0], threading.Event(), itertools.count()

    def decode() -> None:
        while not ended.is_set():
            Image.open(io.BytesIO(jpeg)).convert("RGB").resize((width, height))
            next(decoded)

    decoder = threading.Thread(target=decode)
    decoder.start()
    started = time.perf_counter()
    found["beside crops/s"], _ = run(sizes)
    ended.set()
    decoder.join()
    found["beside JPEGs/s"] = next(decoded) / (time.perf_counter() - started)
    found["MiB added"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - loaded
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--onnx", help="a bundle's graph; the built-in encoder's by default")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.onnx, ROWS[arguments.row], arguments.seconds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.onnx or str(export_builtin(Path(folder)))
        command = [sys.executable, __file__, "--onnx", path, "--seconds", str(arguments.seconds), "--row"]
        found: dict[str, list[dict[str, float]]] = {row: [] for row in ROWS}
        for _ in range(arguments.rounds):
            for row in ROWS:
                found[row].append(json.loads(subprocess.check_output([*command, row])))
    columns = list(found[next(iter(ROWS))][0])
    print(f"{'':16}" + "".join(f"{column:>16}" for column in columns))
    for row, rounds in found.items():
        medians = [statistics.median(one[column] for one in rounds) for column in columns]
        print(f"{row:16}" + "".join(f"{median:16.2f}" for median in medians))


def export_builtin(folder: Path) -> Path:
    """The built-in encoder's graph."""
    from resight.encoder.weights import load_weights
    from resight.exporters.export import export_encoder

    initial = load_weights("builtin")
    licence = initial.source["licence"]
    export_encoder(initial.encoder, folder / "bundle", name="bench", training={}, weights_licence=licence)
    return folder / "bundle" / "model.onnx"


if __name__ == "__main__":
    main()
