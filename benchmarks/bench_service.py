"""The service against its parts, over loopback; client and server share two cores, and figures are ratios of one run.

    python benchmarks/bench_service.py [--only embed,batching,overhead,index,overload,shadow,migration] [--seconds 6]
    python benchmarks/bench_service.py --full    # and a million entries: 6 GB of disk, 5 GB of memory, some minutes

The server is `resight serve` with its defaults, the client a process of its own that sends requests made beforehand
(`load.py`). Weights are random and crops drawn: time depends on neither. What a ratio compares takes turns.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

from pieces import Bench, Rows, crops
from service_beside import migration, shadow
from service_gallery import index, large
from service_overload import overload
from service_speed import CORES, batching, embed, overhead

MODELS = ("resnet50", "osnet_x0_25")


def cpu_name() -> str:
    """As the kernel tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Measure and print, a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of measurements, with commas")
    parser.add_argument("--models", default=",".join(MODELS), help="backbones of embed and overload")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of what is compared; the median counts")
    parser.add_argument("--full", action="store_true", help="also a million entries")
    parser.add_argument("--folder", type=Path, help="for bundles, kept, and data; a temporary one by default")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # and of every process started from here
    models = tuple(arguments.models.split(","))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as data:
        bench = Bench(arguments.folder or Path(data), Path(data), arguments.seconds, arguments.rounds, crops())
        measurements: dict[str, Callable[[], Rows]] = {
            "embed": lambda: embed(bench, models),
            "batching": lambda: batching(bench),
            "overhead": lambda: overhead(bench),
            "index": lambda: index(bench),
            "overload": lambda: overload(bench, models),
            "shadow": lambda: shadow(bench),
            "migration": lambda: migration(bench),
            "large": lambda: large(bench),
        }
        names = (
            arguments.only.split(",")
            if arguments.only
            else [name for name in measurements if name != "large" or arguments.full]
        )
        if unknown := set(names) - set(measurements):
            parser.error(f"no measurement {', '.join(sorted(unknown))}: there are {', '.join(measurements)}")
        print(
            f"{cpu_name()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n"
        )
        print("| what | figure | goal | |\n| --- | --- | --- | --- |")
        for name in names:
            for row in measurements[name]():
                verdict = "" if row.ok is None else "ok" if row.ok else "**short**"
                print(f"| {row.what} | {row.figure} | {row.goal} | {verdict} |", flush=True)


if __name__ == "__main__":
    main()
