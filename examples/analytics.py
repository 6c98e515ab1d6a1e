"""A loop of video analytics: it reads frames with tracked boxes, and acts on the search results.

    python examples/analytics.py --server 127.0.0.1:50051 --collection lobby

Each track becomes one query and one entry, made of its crops. People at the entrance are enrolled; people in the
yard are searched for among the entries of *other* cameras, and the decision determines the action:

- match: the same person, so the track is enrolled under that person's subject.
- uncertain: an operator should check it; until then the track is enrolled under its own subject.
- unknown: not seen before, enrolled as a new subject.

A space without a calibration has no decisions: an operator has to check every track.
The last line on stdout is the summary.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from drawn_camera import DrawnCamera, Frame, two_cameras
from PIL import Image

from resight.client import AsyncClient, NewEntry, Where
from resight.errors import CollectionExistsError, ReIDError

log = logging.getLogger("analytics")

MOST_CROPS = 8  # of a track: more cost time and add little
GONE_S = 1.0  # a track not seen for this time has ended
IN_FLIGHT = 8  # calls at once: enough for the server to batch
KEPT = timedelta(days=1)


@dataclass
class Track:
    """Crops of one person from one camera: up to `MOST_CROPS` crops, as JPEG files."""

    camera_id: str
    track_id: str
    first_seen: datetime
    last_seen: datetime
    crops: list[bytes] = field(default_factory=list)

    def add(self, frame: Frame, xyxy: tuple[int, int, int, int]) -> None:
        """Add the crop of a frame."""
        self.last_seen = frame.time
        if len(self.crops) < MOST_CROPS:
            left, top, right, bottom = xyxy
            buffer = io.BytesIO()
            Image.fromarray(frame.image[top:bottom, left:right]).save(buffer, "JPEG", quality=90)
            self.crops.append(buffer.getvalue())

    def entry(self, subject_id: str) -> NewEntry:
        """The entry of all crops; it replaces an earlier entry of the track."""
        return NewEntry(
            self.crops,
            entry_id=self.track_id,
            subject_id=subject_id,
            camera_id=self.camera_id,
            track_id=self.track_id,
            capture_time=self.first_seen,
            replace=True,
        )


def tracks(frames: Iterable[Frame]) -> Iterator[Track]:
    """Tracks of one camera, each yielded when it has ended."""
    open_ones: dict[str, Track] = {}
    for frame in frames:
        for box in frame.boxes:
            track = open_ones.setdefault(box.track_id, Track(frame.camera_id, box.track_id, frame.time, frame.time))
            track.add(frame, box.xyxy)
        for track in [one for one in open_ones.values() if (frame.time - one.last_seen).total_seconds() > GONE_S]:
            yield open_ones.pop(track.track_id)
    yield from open_ones.values()


class Analytics:
    """Enrols and searches the tracks of cameras.

    Args:
        client: of the server.
        collection: to enrol into and search in.
    """

    def __init__(self, client: AsyncClient, collection: str) -> None:
        self._client, self._collection = client, collection
        self._places = asyncio.Semaphore(IN_FLIGHT)
        self.subjects: dict[str, str] = {}
        self.decisions: Counter[str] = Counter()

    async def enrol_all(self, frames: Iterable[Frame]) -> None:
        """Enrol each track of a camera as a subject of its own."""
        async with asyncio.TaskGroup() as group:
            for track in tracks(frames):
                group.create_task(self._enrol(track, f"subject-of-{track.track_id}"))

    async def search_all(self, frames: Iterable[Frame]) -> None:
        """Search each track of a camera among the entries of other cameras."""
        async with asyncio.TaskGroup() as group:
            for track in tracks(frames):
                group.create_task(self._search(track))

    async def _enrol(self, track: Track, subject_id: str) -> None:
        async with self._places:
            entry = await self._client.enrol(self._collection, track.entry(subject_id))
        self.subjects[track.track_id] = subject_id
        log.info("enrolled %s as %s from %d crops", track.track_id, subject_id, entry.shot_count)

    async def _search(self, track: Track) -> None:
        others = Where(exclude_camera_ids=[track.camera_id])
        async with self._places:
            result = await self._client.search(self._collection, track.crops, top_k=3, where=others, group_by="subject")
        decision = result.decision or "uncertain"
        self.decisions[decision] += 1
        own = f"subject-of-{track.track_id}"
        if decision == "match":
            best = result.hits[0]
            log.info("%s is %s, probability %.3f", track.track_id, best.entry.subject_id, best.probability)
            await self._enrol(track, best.entry.subject_id)
            return
        if decision == "uncertain":
            nearest = ", ".join(f"{hit.entry.subject_id} ({hit.similarity:.2f})" for hit in result.hits)
            log.warning("%s: an operator should check whether it is one of %s", track.track_id, nearest)
        await self._enrol(track, own)


async def run(options: argparse.Namespace) -> None:
    """Process both cameras in turn, and print a summary."""
    entrance, yard = two_cameras(
        options.people, options.strangers, datetime.now(UTC), world=options.world, seed=options.seed
    )
    ca = os.environ.get("RESIGHT_TLS_CA")
    async with AsyncClient(
        options.server, timeout_s=30, token=os.environ.get("RESIGHT_TOKEN"), tls_ca=Path(ca) if ca else None
    ) as client:
        await client.wait_ready(options.wait)
        try:
            await client.create_collection(options.collection, ttl=KEPT)
        except CollectionExistsError:
            log.info("collection %s already exists", options.collection)
        analytics = Analytics(client, options.collection)
        await analytics.enrol_all(entrance.frames())
        await analytics.search_all(yard.frames())
    json.dump(summary(analytics, entrance, yard), sys.stdout)
    sys.stdout.write("\n")


def summary(analytics: Analytics, entrance: DrawnCamera, yard: DrawnCamera) -> dict[str, int]:
    """What was decided, and how many of the matches are the same person; only drawn cameras know."""
    whose = {analytics.subjects[track]: person for track, person in entrance.truth.items()}
    matched = [(track, analytics.subjects[track]) for track in yard.truth if analytics.subjects[track] in whose]
    right = sum(yard.truth[track] == whose[subject] for track, subject in matched)
    counts = {name: analytics.decisions[name] for name in ("match", "uncertain", "unknown")}
    return {"enrolled": len(entrance.truth), "searched": len(yard.truth), **counts, "right_matches": right}


def main() -> None:
    """Parse the arguments, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="127.0.0.1:50051")
    parser.add_argument("--collection", default="analytics")
    parser.add_argument("--people", type=int, default=24, help="who pass each of the two drawn cameras")
    parser.add_argument("--strangers", type=int, default=6, help="how many of them pass one camera only")
    parser.add_argument("--world", choices=("source", "site"), default="source", help="what the cameras are like")
    parser.add_argument("--wait", type=float, default=60.0, help="seconds for the server to become ready")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        asyncio.run(run(options))
    except* ReIDError as errors:
        sys.exit("; ".join(str(error) for error in errors.exceptions))


if __name__ == "__main__":
    main()
