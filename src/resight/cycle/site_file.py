"""`site.toml`: everything a cycle is told about one site. docs/cycle.md has the same fields as a table.

Paths are relative to the folder of the file. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from resight.cycle.site_sections import (
    Adapt,
    Camera,
    Collect,
    Export,
    GalleryCrops,
    Gate,
    Local,
    Migrate,
    Schedule,
    Section,
    Service,
    Shadow,
    Watch,
)
from resight.errors import RecipeError


class SiteFile(Section):
    """One site.

    Attributes:
        name: of the site; its models are called ``NAME-000042`` after the runs that made them.
        state: folder of the cycle: crops, runs, history; made when missing.
        service: the server whose models and collections are kept up.
        camera: where footage comes from; any number.
        gallery: collections whose kept crops are trained on too; any number.
        collect: how many crops make a run, and how long they are kept.
        adapt: how the candidate is trained.
        gate: when a candidate may go on.
        export: forms of its bundle.
        migrate: collections that follow the model.
        shadow: answering live searches before promotion.
        watch: looking at live searches after it.
        schedule: when, and at which cost.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,54}$")]
    state: Local = Field(default=Path("state"), validate_default=True)
    service: Service
    camera: tuple[Camera, ...] = ()
    gallery: tuple[GalleryCrops, ...] = ()
    collect: Collect = Collect()
    adapt: Adapt = Adapt()
    gate: Gate = Gate()
    export: Export = Export()
    migrate: Migrate = Migrate()
    shadow: Shadow = Shadow()
    watch: Watch = Watch()
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def _names_are_their_own(self) -> SiteFile:
        for what, names in (
            ("camera", [one.name for one in self.camera]),
            ("gallery", [one.collection for one in self.gallery]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"two of [[{what}]] are called {twice[0]!r}: give each its own name")
        return self

    def model_id(self, run: int) -> str:
        """Name of the model that a run makes, and of its folder in the model root."""
        return f"{self.name}-{run:06d}"


def load_site(path: Path) -> SiteFile:
    """Read and check a site's file.

    Raises:
        RecipeError: it is not there or no TOML, a key is unknown or missing, or a value is out of range.
    """
    if path.is_dir():
        path /= "site.toml"
    try:
        told = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise RecipeError(f"no site file {path}: write one with `resight cycle init {path.parent}`") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"site file {path} cannot be read as TOML: {error}") from error
    try:
        return SiteFile.model_validate(told, context={"folder": path.resolve().parent})
    except ValidationError as error:
        raise RecipeError(f"{path}: {_tell(error)}", field=_spell(error.errors()[0]["loc"])) from error


def _tell(error: ValidationError) -> str:
    """The first fault: what was expected, what was found, what to do."""
    first = error.errors()[0]
    name = _spell(first["loc"])
    if first["type"] == "missing":
        return f"{name} is missing: add a line for it (docs/cycle.md tells every key)"
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(first["loc"][-1]), _keys(first["loc"][:-1]), 1)
        meant = f"did you mean {near[0]}?" if near else "take the line out"
        return f"there is no key {name}, {meant} (docs/cycle.md tells every key)"
    reason = str(first["msg"]).removeprefix("Value error, ")
    found = "" if first["type"] == "value_error" else f", found {first['input']!r}"
    return f"{name or 'the file'}: {reason}{found} (docs/cycle.md tells every key)"


def _spell(place: tuple[int | str, ...]) -> str:
    """A place in the file as people write it: ``camera[0].source``."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _keys(place: tuple[int | str, ...]) -> list[str]:
    """The keys that are known at a place."""
    kind: type[BaseModel] = SiteFile
    for part in place:
        if isinstance(part, str):
            kind = section_of(kind, part)
    return list(kind.model_fields)


def section_of(kind: type[BaseModel], name: str) -> type[BaseModel]:
    """The section that a key of another holds, a list's items included."""
    annotation: Any = kind.model_fields[name].annotation
    inner = getattr(annotation, "__args__", (annotation,))[0]
    assert isinstance(inner, type) and issubclass(inner, BaseModel), name
    return inner
