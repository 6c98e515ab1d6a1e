"""What the demo of the cycle walks with: its nights, the site's file, and the commands it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from resight.errors import CycleError
from resight.machine import cores, threads

if TYPE_CHECKING:
    from resight.model import Encoder
    from resight.training.nights import Night
    from resight.training.nights_page import Step

LATER = 75  # status of `resight cycle once`: the run goes on the next time
TRIES = 3  # of a run that goes on the next time
FIRST_BUNDLE = "first"
ROLLBACK_AFTER = 2  # the night whose promotion an operator takes back


@dataclass(frozen=True)
class Scale:
    """How large the simulated site is, and how much it trains; by default what two cores do in a quarter of an hour.

    Attributes:
        visitors: people who come each night.
        enrolled: people who are searched for.
        cameras: on the first night; one more hangs from the third on.
        epochs: of each stage of training.
        iters: batches an epoch.
        precision: forms of each bundle, as `resight export` takes them.
    """

    visitors: int = 45
    enrolled: int = 40
    cameras: int = 4
    epochs: int = 1
    iters: int = 32
    precision: str = "auto"


@dataclass
class NightRoad:
    """What to walk with."""

    out: Path
    scale: Scale
    seed: int
    console: Console
    nights: list[tuple[Night, str]] = field(default_factory=list)  # and what there is to see; empty = `plan`
    first: Encoder | None = None  # of the model everything starts with; None = the built-in weights
    steps: list[Step] = field(default_factory=list)
    entries: frozenset[str] = frozenset()  # ids of everybody enrolled

    @property
    def file(self) -> Path:
        """The site's file."""
        return self.out / "site.toml"

    @property
    def models(self) -> Path:
        """The folder of models that cycle and server share."""
        return self.out / "models"


def plan(scale: Scale) -> list[tuple[Night, str]]:
    """The nights, and what there is to see in each."""
    from resight.training.nights import Night

    more = scale.cameras + 1
    return [
        (Night(1, scale.visitors, scale.cameras), "the first night the cycle sees"),
        (Night(2, scale.visitors, scale.cameras), "other people, the same cameras"),
        (Night(3, scale.visitors, more, dusk=True), "a new camera hangs, dusk has fallen on the others"),
        (
            Night(4, scale.visitors, more, dusk=True, dead=1, one_person=True),
            "poisoned: one camera is dead, one and the same person passes all others",
        ),
    ]


def site_file(road: NightRoad, address: str, cameras: int) -> str:
    """The site's file, with the cameras that hang by now."""
    lines = [
        'name = "street"',
        "[service]",
        f'address = "{address}"',
        f'model_root = "{road.models.name}"',
        f'bundle = "{road.models.name}/{FIRST_BUNDLE}"',
    ]
    for number in range(1, cameras + 1):
        films = f"footage/*/cam{number}"
        lines += ["[[camera]]", f'name = "cam{number}"', f'source = "{films}.mp4"']
        lines += [f'detections = "{films}.detections.jsonl"']
    lines += ["[collect]", "min_crops = 100", "hold_out = 0.4"]  # few tracks make a night here
    lines += ["[adapt]", f"epochs = {road.scale.epochs}", f"iters = {road.scale.iters}"]
    # All models here are of one network, so that only other load can make one slower than another.
    lines += ["[gate]", "max_latency_ratio = 5.0"]
    lines += ["[export]", f'precision = "{road.scale.precision}"']
    lines += ["[shadow]", "min_searches = 30", "max_minutes = 1.0", "max_latency_ratio = 5.0"]
    lines += ["[watch]", "minutes = 0.1", "min_searches = 30"]
    lines += ["[schedule]", "nice = 0", "idle_io = false"]  # somebody is waiting
    return "\n".join(lines) + "\n"


def cycle_once(road: NightRoad, night: int) -> dict[str, Any]:
    """One run of the cycle, to its end; what `resight cycle once --json` tells of it.

    Raises:
        CycleError: it told nothing, or did not come to an end.
    """
    told = road.out / f"night-{night}.json"
    for _ in range(TRIES):
        done = resight(road, f"night-{night}", "cycle", "once", road.file, "--json", told)
        if not told.is_file():
            raise CycleError(f"`resight cycle once` ended with status {done.returncode}: {_tail(done)}")
        if done.returncode != LATER:
            found: dict[str, Any] = json.loads(told.read_text())
            return found
    raise CycleError(f"the cycle of night {night} did not end in {TRIES} calls: {_tail(done)}")


def roll_back(road: NightRoad) -> str:
    """Take the last promotion back; what the command says.

    Raises:
        CycleError: it could not.
    """
    done = resight(road, "rollback", "cycle", "rollback", road.file)
    if done.returncode:
        raise CycleError(f"`resight cycle rollback` ended with status {done.returncode}: {_tail(done)}")
    return "; ".join(line.strip() for line in done.stdout.splitlines() if line.strip())


def resight(road: NightRoad, log: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own; what it says is kept in a file of the demo's folder.

    A core is left to the service: threads of one computation that wait for each other take many times as long where
    another process holds one of their cores.
    """
    command = [sys.executable, "-m", "resight.cli", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(min(threads(), max(1, cores() - 1)))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    (road.out / f"{log}.log").write_text(done.stdout + done.stderr)
    return done


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    """The end of what a command said."""
    return "\n".join((done.stdout + done.stderr).splitlines()[-15:])
