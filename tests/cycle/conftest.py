"""A site whose server really serves, and runs that stand before the stages that need it: training costs a minute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import pytest
from cycles import COLLECTION, ENTRIES, write_site
from serving import ServerProcess, jpeg, make_bundle

from resight.bundle import Bundle
from resight.calibration import Calibration
from resight.client import Client, NewEntry
from resight.cycle.active import write_active
from resight.cycle.conductor import STAGES, Conductor
from resight.cycle.layout import Layout
from resight.cycle.outcome import Outcome, write_outcome
from resight.cycle.server import find_active
from resight.cycle.site_file import load_site
from resight.cycle.state import Run, Runs, Stage

CURVE = Calibration(0.5, 10.0, 0.95, 0.3, 0.001, 0.05, 100, 100, "tests", "tests", 0.01)


@dataclass
class Place:
    """A site and its server."""

    folder: Path
    server: ServerProcess
    client: Client

    @property
    def file(self) -> Path:
        return self.folder / "site.toml"

    @property
    def layout(self) -> Layout:
        return Layout(self.folder / "state")

    def write(self, *changes: tuple[str, str]) -> None:
        write_site(self.folder, self.client.address, *changes)

    def begin(self, *, seed: int, calibration: Calibration | None = None) -> int:
        """A run that has made a candidate: everything before `backfill` is done."""
        with Runs(self.layout.database) as runs:
            run = runs.begin().run
        folder = self.layout.run(run)
        bundle = self.folder / "models" / f"lobby-{run:06d}"
        made: Bundle = make_bundle(bundle, seed=seed, calibration=calibration)
        (folder.path / "checkpoint").mkdir(parents=True)
        write_active(folder.baseline, find_active(load_site(self.file), self.layout, self.client))
        for stage in STAGES[: STAGES.index("backfill")]:
            figures = {"until_s": 7.0} if stage == "collect" else {"space_id": made.manifest.space_id}
            write_outcome(folder.result(stage), Outcome(figures=figures))
        return run

    def once(self, stop: Event | None = None) -> tuple[Run, dict[str, Stage]]:
        ended = Conductor(self.file, stop or Event(), pauses_s=(0.1,)).once()
        with Runs(self.layout.database) as runs:
            return ended, runs.stages(ended.run)

    def active(self) -> str:
        (found,) = (one.model_id for one in self.client.models() if one.active)
        return found

    def finds(self, person: int) -> float:
        """Similarity of the best hit for an enrolled crop."""
        return self.client.search(COLLECTION, jpeg(person)).hits[0].similarity


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    bundle = make_bundle(tmp_path / "models" / "first", seed=0, calibration=CURVE)
    server = ServerProcess(bundle.path, tmp_path / "data", "--models", str(tmp_path / "models"))
    try:
        with Client(server.wait_ready()) as client:
            client.create_collection(COLLECTION, keep_crops=True, unlimited_retention=True)
            people = [NewEntry(jpeg(person), entry_id=f"p{person}") for person in range(ENTRIES)]
            client.enrol_batch(COLLECTION, people)
            found = Place(tmp_path, server, client)
            found.write()
            yield found
    finally:
        server.end()
