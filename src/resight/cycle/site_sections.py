"""The sections of `site.toml`, each with what its keys mean; `site_file` joins and reads them."""

from __future__ import annotations

import datetime
import zoneinfo
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

CLOCK = r"([01]\d|2[0-3]):[0-5]\d"


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    return Path((info.context or {}).get("folder", ".")) / path.expanduser()


Local = Annotated[Path, AfterValidator(_beside_the_file)]


class Section(BaseModel):
    """Frozen; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Service(Section):
    """The server of the site.

    Attributes:
        address: ``HOST:PORT``.
        token_file: file with a token of role admin, where the server asks for one.
        tls_ca: PEM authorities of the server's certificate; without it the connection is in clear.
        client_cert: PEM certificate of the cycle, where the server asks for one.
        client_key: PEM private key of it.
        model_root: the folder the server was given as ``--models``, as this machine sees it.
        bundle: the model the server was first started with, as this machine sees it; what the first candidate is
            judged against.
    """

    address: str = "127.0.0.1:50051"
    token_file: Local | None = None
    tls_ca: Local | None = None
    client_cert: Local | None = None
    client_key: Local | None = None
    model_root: Local
    bundle: Local


class Camera(Section):
    """One camera.

    Attributes:
        name: of the camera, in crops and figures.
        source: video file, folder of images, or a pattern with ``*`` that names many; or an ``rtsp://`` address.
        start: when the footage began, of one file that does not tell it: an ISO 8601 time with its offset.
        fps: frames a second that are looked at.
        detector: as ``resight ingest --detector`` takes it; an ``.onnx`` file's path is relative to this file.
        detector_weights: state dict of the detector, instead of a download.
        detections: file, or pattern, of boxes from elsewhere, one for each file of ``source`` in the order of their
            names; taken instead of a detector.
        tracks: ``own``, or ``given`` = those of ``detections``.
        crops_per_track: at most.
        min_height: rows of a box at least.
        seconds: of a live source, how long it is recorded in one run.
    """

    name: Annotated[str, Field(min_length=1, max_length=63)]
    source: Annotated[str, Field(min_length=1)]
    start: datetime.datetime | None = None
    fps: Annotated[float, Field(gt=0.0, le=60.0)] = 5.0
    detector: str = "fasterrcnn-mobilenet"
    detector_weights: Local | None = None
    detections: str | None = None
    tracks: Literal["own", "given"] = "own"
    crops_per_track: Annotated[int, Field(ge=1, le=1000)] = 8
    min_height: Annotated[int, Field(ge=16, le=4096)] = 64
    seconds: Annotated[float, Field(gt=0.0)] = 3600.0

    @field_validator("source", "detections")
    @classmethod
    def _place(cls, text: str | None, info: ValidationInfo) -> str | None:
        return text if text is None or "://" in text else str(_beside_the_file(Path(text), info))

    @field_validator("detector")
    @classmethod
    def _file_or_name(cls, text: str, info: ValidationInfo) -> str:
        return str(_beside_the_file(Path(text), info)) if text.endswith(".onnx") else text

    @field_validator("start")
    @classmethod
    def _with_an_offset(cls, when: datetime.datetime | None) -> datetime.datetime | None:
        if when is not None and when.tzinfo is None:
            raise ValueError(f"expected a time with its offset, such as 2026-11-21T02:00:00+01:00, found {when}")
        return when


class GalleryCrops(Section):
    """A collection of the server whose kept crops become training data.

    Attributes:
        collection: its name; it keeps crops.
    """

    collection: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")]


class Collect(Section):
    """Which crops make a run.

    Attributes:
        min_crops: fewer new ones since the last run that counted, and the run is skipped.
        max_crops: taken at most, balanced over cameras.
        replay: share of older crops among them, so that what is not there tonight is not forgotten.
        hold_out: share of each camera's new crops that is not adapted to, but judged on.
        max_reference: crops of earlier nights, kept to judge every candidate on.
        retention_days: crops older than this leave the state folder.
        history_days: a run's pages, which show crops, leave it after so many days; its figures stay.
    """

    min_crops: Annotated[int, Field(ge=1)] = 500
    max_crops: Annotated[int, Field(ge=2)] = 20_000
    replay: Annotated[float, Field(ge=0.0, le=0.9)] = 0.3
    hold_out: Annotated[float, Field(ge=0.0, le=0.9)] = 0.2
    max_reference: Annotated[int, Field(ge=1)] = 4000
    retention_days: Annotated[float, Field(gt=0.0)] = 30.0
    history_days: Annotated[float, Field(gt=0.0)] = 30.0


class Adapt(Section):
    """How the candidate is trained.

    Attributes:
        recipe: as ``resight adapt --recipe`` takes it.
        start_from: ``active``, the checkpoint of the active model, or ``base``.
        base: weights or checkpoint as ``resight adapt --init`` takes it; a file's path is relative to this file.
        epochs: of each stage; none = the recipe's.
        iters: batches an epoch; none = the recipe's.
        set: changes of the recipe, as ``resight adapt --set`` takes them.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        seed: of every stream of chance.
    """

    recipe: str = "purify-camera"
    start_from: Literal["active", "base"] = "active"
    base: str = "builtin"
    epochs: Annotated[int, Field(ge=1)] | None = None
    iters: Annotated[int, Field(ge=1)] | None = None
    set: tuple[str, ...] = ()
    device: str = "cpu"
    seed: Annotated[int, Field(ge=0)] = 1

    @field_validator("base")
    @classmethod
    def _place(cls, text: str, info: ValidationInfo) -> str:
        beside = _beside_the_file(Path(text), info)
        return str(beside) if "/" in text or beside.exists() else text


class Gate(Section):
    """When a judged candidate goes on.

    Attributes:
        allow_undecided: also when the judgement is ``undecided``.
        max_latency_ratio: the candidate's time for one crop over the active model's, measured by the judge.
    """

    allow_undecided: bool = False
    max_latency_ratio: Annotated[float, Field(gt=0.0)] = 1.5


class Export(Section):
    """The candidate's bundle.

    Attributes:
        precision: as ``resight export --precision`` takes it.
    """

    precision: str = "auto"


class Migrate(Section):
    """Which collections follow the model.

    Attributes:
        collections: their names; empty = all that keep crops.
        missing_crops: what of entries without a stored crop: ``fail``, or ``drop`` = they are not found any more.
    """

    collections: tuple[str, ...] = ()
    missing_crops: Literal["fail", "drop"] = "fail"


class Shadow(Section):
    """The candidate beside the active model, on live searches.

    Attributes:
        share: of the searches, that it answers too; 0 = no shadow.
        min_searches: answered by both before it is judged.
        max_minutes: waited for them.
        min_agreement: share of searches whose best hit is the same in both; a good model differs from a bad one.
        max_latency_ratio: its 95th percentile of time for one search over the active model's.
        required: refuse when there were too few searches; else go on without this witness.
    """

    share: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    min_searches: Annotated[int, Field(ge=1)] = 100
    max_minutes: Annotated[float, Field(ge=0.0)] = 60.0
    min_agreement: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    max_latency_ratio: Annotated[float, Field(gt=0.0)] = 1.5
    required: bool = False


class Watch(Section):
    """The promoted model on live searches.

    Attributes:
        minutes: looked at it; 0 = no watch.
        min_searches: before anything is said.
        max_unknown_rise: of the share of searches decided ``unknown``, against the model before.
        max_drift: population stability index of best hits' cosines within the watch.
        action: what follows: ``alert`` or ``rollback``.
    """

    minutes: Annotated[float, Field(ge=0.0)] = 60.0
    min_searches: Annotated[int, Field(ge=1)] = 100
    max_unknown_rise: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    max_drift: Annotated[float, Field(gt=0.0)] = 0.25
    action: Literal["alert", "rollback"] = "rollback"


class Schedule(Section):
    """When `resight cycle run` begins a run, and what it may take.

    Attributes:
        cron: minute, hour, day, month, day of week.
        timezone: of ``cron`` and ``window``, such as ``Europe/Berlin``.
        window: hours a run may work in, such as ``02:00-05:00``; what is not done goes on the next time. Empty = any.
        nice: of the stages' processes, 0..19.
        idle_io: they read and write only when nobody else does, where ``ionice`` is there.
        budget_minutes: of one call of the cycle; 0 = none. What is not done goes on the next time.
    """

    cron: str = "0 2 * * *"
    timezone: str = "UTC"
    window: Annotated[str, Field(pattern=rf"^({CLOCK}-{CLOCK})?$")] = ""
    nice: Annotated[int, Field(ge=0, le=19)] = 10
    idle_io: bool = True
    budget_minutes: Annotated[float, Field(ge=0.0)] = 0.0

    @field_validator("cron")
    @classmethod
    def _five_fields(cls, text: str) -> str:
        from apscheduler.triggers.cron import CronTrigger

        CronTrigger.from_crontab(text)  # ValueError with its own words
        return text

    @field_validator("window")
    @classmethod
    def _lasts(cls, text: str) -> str:
        begins, _, ends = text.partition("-")
        if text and begins == ends:
            raise ValueError(f"expected a window that lasts, such as 02:00-05:00, found {text!r}")
        return text

    @field_validator("timezone")
    @classmethod
    def _known(cls, text: str) -> str:
        try:
            zoneinfo.ZoneInfo(text)
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(f"expected a zone of the IANA database such as Europe/Berlin, found {text!r}") from error
        return text
