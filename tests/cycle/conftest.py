"""A site with a running server, and runs prepared up to the stages that need it: training would take a minute."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import pytest
from cycles import COLLECTION, ENTRIES, write_site
from serving import ServerProcess, jpeg, make_bundle

from resight.bundle.bundle import Bundle
from resight.calibration import Calibration
from resight.client import Client, NewEntry
from resight.cycle.conductor import STAGES, Conductor
from resight.cycle.runs import CycleRun, RunDatabase, StageRun
from resight.cycle.server import find_active_model
from resight.cycle.site import load_site
from resight.cycle.state_folder import StageOutcome, StateFolder, write_active, write_outcome

CURVE = Calibration(0.5, 10.0, 0.95, 0.3, 0.001, 0.05, 100, 100, "tests", "tests", 0.01)


@dataclass
class Place:
    """A site and its server."""

    folder: Path
    models: Path
    server: ServerProcess
    client: Client

    @property
    def file(self) -> Path:
        return self.folder / "site.toml"

    @property
    def layout(self) -> StateFolder:
        return StateFolder(self.folder / "state")

    def write(self, *changes: tuple[str, str]) -> None:
        places = [(f'"{name}', f'"{self.models}{name.removeprefix("models")}') for name in ("models/first", "models")]
        write_site(self.folder, self.client.address, *places, *changes)

    def begin(self, *, seed: int, calibration: Calibration | None = None) -> int:
        """A run with a candidate: all stages before `backfill` are done."""
        with RunDatabase(self.layout.database) as runs:
            run = runs.begin().run
        folder = self.layout.run(run)
        bundle = self.models / f"lobby-{run:06d}"
        made: Bundle = make_bundle(bundle, seed=seed, calibration=calibration)
        (folder.path / "checkpoint").mkdir(parents=True)
        write_active(folder.baseline, find_active_model(load_site(self.file), self.layout, self.client))
        for stage in STAGES[: STAGES.index("backfill")]:
            figures = {"until_s": 7.0} if stage == "collect" else {"space_id": made.manifest.space_id}
            write_outcome(folder.result(stage), StageOutcome(figures=figures))
        return run

    def run_once(self, stop: Event | None = None) -> tuple[CycleRun, dict[str, StageRun]]:
        ended = Conductor(self.file, stop or Event(), pauses_s=(0.1,)).run_once()
        with RunDatabase(self.layout.database) as runs:
            return ended, runs.stages(ended.run)

    def active(self) -> str:
        (found,) = (one.model_id for one in self.client.models() if one.active)
        return found

    def finds(self, person: int) -> float:
        """Similarity of the best hit for an enrolled crop."""
        return self.client.search(COLLECTION, jpeg(person)).hits[0].similarity


def started(folder: Path) -> ServerProcess:
    """A server with a folder of models, the first of which is active."""
    bundle = make_bundle(folder / "models" / "first", seed=0, calibration=CURVE)
    return ServerProcess(bundle.path, folder / "data", "--models", str(folder / "models"))


def filled(folder: Path, root: Path, server: ServerProcess, client: Client) -> Place:
    """A site with a collection of people."""
    client.create_collection(COLLECTION, keep_crops=True, unlimited_retention=True)
    client.enrol_batch(COLLECTION, [NewEntry(jpeg(person), entry_id=f"p{person}") for person in range(ENTRIES)])
    found = Place(folder, root, server, client)
    found.write()
    return found


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, ServerProcess]]:
    """One server for all tests; each test has its own collection and models."""
    root = tmp_path_factory.mktemp("shared")
    server = started(root)
    try:
        server.wait_ready()
        yield root, server
    finally:
        server.end()


@pytest.fixture
def place(shared: tuple[Path, ServerProcess], tmp_path: Path) -> Iterator[Place]:
    root, server = shared
    with Client(server.wait_ready()) as client:
        try:
            yield filled(tmp_path, root / "models", server, client)
        finally:
            client.activate_model("first")
            for collection in list(client.collections()):
                client.delete_collection(collection.name, force=True)
            for model in list(client.models()):
                if model.state == "ready" and model.model_id != "first":
                    client.unload_model(model.model_id)
            for bundle in (root / "models").glob("lobby-*"):
                shutil.rmtree(bundle)
            for request in list(client.pending_adaptations()):
                client.cancel_operation(request.operation_id)


@pytest.fixture
def own_place(tmp_path: Path) -> Iterator[Place]:
    """The same with a server that the test may stop."""
    server = started(tmp_path)
    try:
        with Client(server.wait_ready()) as client:
            yield filled(tmp_path, tmp_path / "models", server, client)
    finally:
        server.end()
