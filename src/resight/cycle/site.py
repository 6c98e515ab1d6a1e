"""`site.toml`: its sections, with the meaning of their keys, and the function that reads it.

docs/cycle.md lists the same keys. Paths are relative to the folder of the file. An unknown key is an error that
suggests the nearest known one.
"""

from __future__ import annotations

import datetime
import tomllib
import zoneinfo
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from resight.errors import RecipeError
from resight.validation import Problem, first_problem, suggestion

CLOCK_TIME = r"([01]\d|2[0-3]):[0-5]\d"


def _relative_to_file(path: Path, info: ValidationInfo) -> Path:
    return Path((info.context or {}).get("folder", ".")) / path.expanduser()


LocalPath = Annotated[Path, AfterValidator(_relative_to_file)]


class SiteSection(BaseModel):
    """Frozen; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ServiceSection(SiteSection):
    """The server of the site.

    Attributes:
        address: ``HOST:PORT``.
        token_file: file with a token of role admin, if the server requires one.
        tls_ca: PEM authorities of the server's certificate; without it the connection is not encrypted.
        client_cert: PEM certificate of the cycle, if the server requires one.
        client_key: PEM private key of ``client_cert``.
        model_root: the server's ``--models`` folder, as a path on this machine.
        bundle: the bundle the server was first started with, as a path on this machine; the first candidate is compared
            with it.
    """

    address: str = "127.0.0.1:50051"
    token_file: LocalPath | None = None
    tls_ca: LocalPath | None = None
    client_cert: LocalPath | None = None
    client_key: LocalPath | None = None
    model_root: LocalPath
    bundle: LocalPath


class CameraSection(SiteSection):
    """One camera.

    Attributes:
        name: of the camera, in crops and figures.
        source: video file, folder of images, or a pattern with ``*`` that names many; or an ``rtsp://`` address.
        start: start time of a single file that does not contain it, as ISO 8601 with its offset.
        fps: frames processed per second of footage.
        detector: as ``resight ingest --detector`` takes it; an ``.onnx`` file's path is relative to this file.
        detector_weights: state dict of the detector, instead of a download.
        detections: file, or pattern, of boxes from another tool, one for each file of ``source`` in order of names;
            used instead of a detector.
        tracks: ``own``, or ``given`` = those of ``detections``.
        crops_per_track: maximum number of crops.
        min_height: minimum height of a box, in pixels.
        seconds: how long a live source is recorded in one run.
    """

    name: Annotated[str, Field(min_length=1, max_length=63)]
    source: Annotated[str, Field(min_length=1)]
    start: datetime.datetime | None = None
    fps: Annotated[float, Field(gt=0.0, le=60.0)] = 5.0
    detector: str = "fasterrcnn-mobilenet"
    detector_weights: LocalPath | None = None
    detections: str | None = None
    tracks: Literal["own", "given"] = "own"
    crops_per_track: Annotated[int, Field(ge=1, le=1000)] = 8
    min_height: Annotated[int, Field(ge=16, le=4096)] = 64
    seconds: Annotated[float, Field(gt=0.0)] = 3600.0

    @field_validator("source", "detections")
    @classmethod
    def _place(cls, text: str | None, info: ValidationInfo) -> str | None:
        return text if text is None or "://" in text else str(_relative_to_file(Path(text), info))

    @field_validator("detector")
    @classmethod
    def _file_or_name(cls, text: str, info: ValidationInfo) -> str:
        return str(_relative_to_file(Path(text), info)) if text.endswith(".onnx") else text

    @field_validator("start")
    @classmethod
    def _with_an_offset(cls, when: datetime.datetime | None) -> datetime.datetime | None:
        if when is not None and when.tzinfo is None:
            raise ValueError(f"expected a time with its offset, such as 2026-11-21T02:00:00+01:00, found {when}")
        return when


class GallerySection(SiteSection):
    """A collection of the server whose kept crops become training data.

    Attributes:
        collection: its name; it keeps crops.
    """

    collection: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")]


class CollectSection(SiteSection):
    """Which crops make a run.

    Attributes:
        min_crops: the run is skipped if there are fewer new crops since the last run that used its crops.
        max_crops: maximum number of crops, balanced over cameras.
        replay: share of older crops among them, against forgetting.
        hold_out: share of each camera's new crops that is used to judge instead of to adapt.
        max_reference: maximum number of crops of earlier nights on which every candidate is judged.
        retention_days: crops older than this are deleted from the state folder.
        history_days: a run's pages, which show crops, are deleted after so many days; its figures are kept.
    """

    min_crops: Annotated[int, Field(ge=1)] = 500
    max_crops: Annotated[int, Field(ge=2)] = 20_000
    replay: Annotated[float, Field(ge=0.0, le=0.9)] = 0.3
    hold_out: Annotated[float, Field(ge=0.0, le=0.9)] = 0.2
    max_reference: Annotated[int, Field(ge=1)] = 4000
    retention_days: Annotated[float, Field(gt=0.0)] = 30.0
    history_days: Annotated[float, Field(gt=0.0)] = 30.0


class AdaptSection(SiteSection):
    """How the candidate is trained.

    Attributes:
        recipe: value of ``resight adapt --recipe``.
        start_from: ``active``, the checkpoint of the active model, or ``base``.
        base: weights or checkpoint, as for ``resight adapt --init``; a file's path is relative to this file.
        epochs: of each stage; none = the recipe's.
        iters: batches per epoch; none = the recipe's.
        set: changes of the recipe, as for ``resight adapt --set``.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        seed: of all random number generators.
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
        local = _relative_to_file(Path(text), info)
        return str(local) if "/" in text or local.exists() else text


class GateSection(SiteSection):
    """Conditions on a judged candidate.

    Attributes:
        allow_undecided: continue if the judgement is ``undecided``.
        max_latency_ratio: the candidate's time for one crop over the active model's, measured by the judge.
    """

    allow_undecided: bool = False
    max_latency_ratio: Annotated[float, Field(gt=0.0)] = 1.5


class ExportSection(SiteSection):
    """The candidate's bundle.

    Attributes:
        precision: value of ``resight export --precision``.
    """

    precision: str = "auto"


class MigrateSection(SiteSection):
    """Which collections are migrated to a new model.

    Attributes:
        collections: their names; empty = all that keep crops.
        missing_crops: for entries without a stored crop: ``fail``, or ``drop`` = searches no longer find them.
    """

    collections: tuple[str, ...] = ()
    missing_crops: Literal["fail", "drop"] = "fail"


class ShadowSection(SiteSection):
    """Comparison of the candidate with the active model on live searches, before promotion.

    Attributes:
        share: share of live searches that the candidate also runs; 0 = no shadow.
        min_searches: number of searches run by both before a decision.
        max_minutes: maximum time to wait for them.
        min_agreement: minimum share of searches with the same best hit; low, because a better model gives other hits.
        max_latency_ratio: maximum ratio of the candidate's 95th percentile of search time to the active model's.
        required: refuse if there were too few searches; otherwise continue without this check.
    """

    share: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    min_searches: Annotated[int, Field(ge=1)] = 100
    max_minutes: Annotated[float, Field(ge=0.0)] = 60.0
    min_agreement: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    max_latency_ratio: Annotated[float, Field(gt=0.0)] = 1.5
    required: bool = False


class WatchSection(SiteSection):
    """Monitoring of live searches after promotion.

    Attributes:
        minutes: duration; 0 = no watch.
        min_searches: number of searches before a regression is reported.
        max_unknown_rise: maximum rise of the share of searches decided ``unknown``, against the previous model.
        max_drift: maximum population stability index of the best hits' cosines during the watch.
        action: on a regression: ``alert`` or ``rollback``.
    """

    minutes: Annotated[float, Field(ge=0.0)] = 60.0
    min_searches: Annotated[int, Field(ge=1)] = 100
    max_unknown_rise: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    max_drift: Annotated[float, Field(gt=0.0)] = 0.25
    action: Literal["alert", "rollback"] = "rollback"


class ScheduleSection(SiteSection):
    """When `resight cycle run` begins a run, and its limits.

    Attributes:
        cron: minute, hour, day, month, day of week.
        timezone: of ``cron`` and ``window``, such as ``Europe/Berlin``.
        window: maintenance window, such as ``02:00-05:00``; an unfinished run resumes the next time. Empty = none.
        nice: niceness of the stages' processes, 0..19.
        idle_io: run stages in the idle I/O class, if ``ionice`` is installed.
        budget_minutes: limit of one call of the cycle; 0 = none. An unfinished run resumes the next time.
    """

    cron: str = "0 2 * * *"
    timezone: str = "UTC"
    window: Annotated[str, Field(pattern=rf"^({CLOCK_TIME}-{CLOCK_TIME})?$")] = ""
    nice: Annotated[int, Field(ge=0, le=19)] = 10
    idle_io: bool = True
    budget_minutes: Annotated[float, Field(ge=0.0)] = 0.0

    @field_validator("cron")
    @classmethod
    def _five_fields(cls, text: str) -> str:
        from apscheduler.triggers.cron import CronTrigger

        CronTrigger.from_crontab(text)  # ValueError says why
        return text

    @field_validator("window")
    @classmethod
    def _lasts(cls, text: str) -> str:
        begins, _, ends = text.partition("-")
        if text and begins == ends:
            raise ValueError(f"expected a window longer than zero, such as 02:00-05:00, found {text!r}")
        return text

    @field_validator("timezone")
    @classmethod
    def _known(cls, text: str) -> str:
        try:
            zoneinfo.ZoneInfo(text)
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(f"expected a zone of the IANA database such as Europe/Berlin, found {text!r}") from error
        return text


class SiteFile(SiteSection):
    """One site.

    Attributes:
        name: of the site; its models are called ``NAME-000042``, by the number of the run.
        state: folder of the cycle: crops, runs, history; created if missing.
        service: the server whose models and collections are updated.
        camera: sources of footage; any number.
        gallery: collections whose kept crops are also trained on; any number.
        collect: number of crops of a run, and their retention.
        adapt: how the candidate is trained.
        gate: conditions on the judged candidate.
        export: precision of its bundle.
        migrate: collections that are migrated to a new model.
        shadow: comparison on live searches before promotion.
        watch: monitoring of live searches after promotion.
        schedule: when runs begin, and their limits.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,54}$")]
    state: LocalPath = Field(default=Path("state"), validate_default=True)
    service: ServiceSection
    camera: tuple[CameraSection, ...] = ()
    gallery: tuple[GallerySection, ...] = ()
    collect: CollectSection = CollectSection()
    adapt: AdaptSection = AdaptSection()
    gate: GateSection = GateSection()
    export: ExportSection = ExportSection()
    migrate: MigrateSection = MigrateSection()
    shadow: ShadowSection = ShadowSection()
    watch: WatchSection = WatchSection()
    schedule: ScheduleSection = ScheduleSection()

    @model_validator(mode="after")
    def _names_are_unique(self) -> SiteFile:
        for what, names in (
            ("camera", [one.name for one in self.camera]),
            ("gallery", [one.collection for one in self.gallery]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"two of [[{what}]] are called {twice[0]!r}: names must be unique")
        return self

    def model_id(self, run: int) -> str:
        """Name of the model that a run creates, and of its folder in the model root."""
        return f"{self.name}-{run:06d}"


def load_site(path: Path) -> SiteFile:
    """Read and check a site's file.

    Raises:
        RecipeError: it does not exist or is not TOML, a key is unknown or missing, or a value is out of range.
    """
    if path.is_dir():
        path /= "site.toml"
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise RecipeError(f"no site file {path}: write one with `resight cycle init {path.parent}`") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"site file {path} cannot be read as TOML: {error}") from error
    try:
        return SiteFile.model_validate(content, context={"folder": path.resolve().parent})
    except ValidationError as error:
        problem = first_problem(error)
        raise RecipeError(f"{path}: {_describe_problem(problem)}", field=problem.key) from error


def _describe_problem(problem: Problem) -> str:
    """What was expected, what was found, what to do."""
    if problem.kind == "missing":
        return f"{problem.key} is missing: add a line for it (docs/cycle.md lists all keys)"
    if problem.kind == "unknown":
        meant = suggestion(str(problem.location[-1]), _known_keys(problem.location[:-1])) or ": remove the line"
        return f"there is no key {problem.key}{meant} (docs/cycle.md lists all keys)"
    return f"{problem.key or 'the file'}: {problem.reason} (docs/cycle.md lists all keys)"


def _known_keys(place: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed at a location."""
    kind: type[BaseModel] = SiteFile
    for part in place:
        if isinstance(part, str):
            kind = section_of(kind, part)
    return list(kind.model_fields)


def section_of(kind: type[BaseModel], name: str) -> type[BaseModel]:
    """The class of the section under a key; for a list, the class of its items."""
    annotation: Any = kind.model_fields[name].annotation
    inner = getattr(annotation, "__args__", (annotation,))[0]
    assert isinstance(inner, type) and issubclass(inner, BaseModel), name
    return inner
