"""What a call of `resight ingest` says of its footage: options that go together, and who finds people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from resight.errors import DetectorError, InputError

if TYPE_CHECKING:
    from resight.training.detect import Detector
    from resight.training.sampling import Sampling
    from resight.training.tracks import Mode

Finder: TypeAlias = "Callable[[int], Detector]"
"""Who finds people in the source of a number."""


@dataclass(frozen=True)
class Call:
    """What a call says of all its sources; the names are those of its options."""

    camera: str
    fps: float
    start_s: float | None
    duration_s: float | None
    hwaccel: str
    sampling: Sampling
    tracks: Mode
    again: bool


def check_options(
    sources: Sequence[str],
    start: str | None,
    duration: float | None,
    detections: Sequence[Path] | None,
    tracks: str,
    weights: Path | None,
) -> None:
    """Refuse options that do not go together, before anything is opened."""
    if start is not None and len(sources) > 1:
        raise InputError(
            f"one --start for {len(sources)} sources: give each with its own in a call of its own", field="start"
        )
    live = [source for source in sources if "://" in source]
    if live and len(sources) > 1:
        raise InputError("a live stream does not end: give it in a call of its own", field="sources")
    if duration is not None and not live:
        raise InputError("--duration is for live streams: leave it away", field="duration")
    if detections and (live or len(detections) != len(sources)):
        raise InputError(
            f"{len(detections)} files of --detections for {len(sources)} sources: expected one for each recording",
            field="detections",
        )
    if tracks not in ("own", "given") or (tracks == "given" and not detections):
        raise InputError(
            f"--tracks {tracks}: expected own, or given with --detections that carry tracks", field="tracks"
        )
    if detections and weights is not None:
        raise InputError("--detections need no detector: leave --detector-weights away", field="detector_weights")


def one_detector(name: str, weights: Path | None, device: str) -> Finder:
    """One detector for all sources, made ready when the first of them has been opened; without it none can be read."""

    @cache
    def detector() -> Detector:
        from resight.training.detect import open_detector
        from resight.training.run import require_device

        require_device(device)
        try:
            return open_detector(name, weights=weights, device=device)
        except DetectorError as error:
            raise InputError(str(error), field=error.field) from error  # of the call, not of this source

    return lambda number: detector()


def given_boxes(detections: Sequence[Path], call: Call) -> Finder:
    """A file of boxes for each source."""
    from resight.training.given_boxes import GivenBoxes

    def find(number: int) -> Detector:
        boxes = GivenBoxes(detections[number], call.fps)
        if call.tracks == "given" and not boxes.has_tracks:
            raise InputError(f"--tracks given: {detections[number]} names no track", field="tracks")
        return boxes

    return find
