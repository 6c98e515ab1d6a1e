"""Recipes: all settings of an adaptation in one TOML file, parsed into frozen dataclasses."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from resight.errors import RecipeError
from resight.training.adaptation.batches import AugmentSettings
from resight.training.clustering.cluster import ClusterSettings
from resight.training.features.extract import Precision
from resight.validation import STRICT, Problem, first_problem, suggestion


@dataclass(frozen=True, config=STRICT)
class ProxySettings:
    """Camera-aware proxies (O2CAP); the defaults are those of the released code.

    Attributes:
        offline: weight of the loss by cluster labels.
        online: weight of the loss by current similarities; 0 disables it.
        positives: number of proxies attracted to by the online loss, at most one per camera.
        negatives: number of most similar other proxies repelled from, in each loss.
        balance: w, weight of the sample's own similarity in selecting online positives; its proxy's has 1 - w.
    """

    offline: Annotated[float, Field(ge=0)] = 1.0
    online: Annotated[float, Field(ge=0)] = 1.0
    positives: Annotated[int, Field(ge=1)] = 3
    negatives: Annotated[int, Field(ge=1)] = 50
    balance: Annotated[float, Field(ge=0, le=1)] = 0.15


@dataclass(frozen=True, config=STRICT)
class SelectiveSettings:
    """Selective contrast; the defaults are those of the released code and its logs.

    Attributes:
        neighbours: P, positives besides the own entry.
        negatives: N_n, the nearest crops after them.
        self_share: lambda_t, weight of the own entry.
        neighbour_gain: alpha, raises the weight of the neighbours.
        local_loss: lambda_p, share of the loss on the stripes.
        camera_penalty: lambda_c, distance added between crops of one camera when neighbours are chosen.
        warmup_epochs: epochs of instance discrimination before neighbours are used.
        mixture: initial values of the mixture bank: "zeros" or the crops' global "features".
    """

    neighbours: Annotated[int, Field(ge=0)] = 7
    negatives: Annotated[int, Field(ge=1)] = 500
    self_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    neighbour_gain: Annotated[float, Field(ge=0)] = 1.75
    local_loss: Annotated[float, Field(ge=0, le=1)] = 0.3
    camera_penalty: Annotated[float, Field(ge=0)] = 0.05
    warmup_epochs: Annotated[int, Field(ge=0)] = 3
    mixture: Literal["zeros", "features"] = "zeros"


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """One method with all its settings; the TOML files give the source of each value.

    Attributes:
        name: the recipe's name.
        labels: "clusters" (none needed), "persons" (supervised) or "none": every crop is its own entry.
        contrast: what a crop is contrasted with: "clusters", "proxies" (clusters split by camera) or "instances".
        sampler: how batches are drawn: "cameras" (K crops of a cluster, partners from other cameras), "balanced" (K
            crops of a cluster, spread evenly over its cameras), "proxies" (K crops of a proxy) or "all" (shuffled).
        aggregate: "mean" over the batch, or the sum of each camera's mean ("cameras").
        student: whether a second model is trained by distillation from the first.
        parts: horizontal stripes, each with its own head; 2 are LP's upper and lower half.
        local_share: share of the stripes in the model's feature; 0 for the global view only.
        epochs: rounds of labelling and training in each stage.
        iters: batches per epoch.
        batch: crops per batch.
        instances: crops of one cluster (or proxy) in a batch.
        samples_per_bn: crops per batch norm group; 0 for the whole batch.
        accumulate: number of parts a batch is computed in, to save memory.
        optimizer: "adam" or "sgd" (Nesterov, momentum 0.9).
        lr: learning rate.
        weight_decay: L2 penalty.
        warmup: epochs of linear warm-up from a hundredth of the rate.
        lr_steps: fractions of the epochs after which the rate is multiplied by lr_decay.
        lr_decay: factor of each step.
        temperature: tau of the contrast.
        momentum: m of the memories.
        local_loss_weight: LP's lambda_2; 0 trains the global view only.
        guidance: LP's mu, the weight of feature distillation in the student.
        relation: weight of relation distillation in the student.
        teacher_batch_norm: "batch" (statistics of the current batch, as released) or "running".
        precision: "auto" (bfloat16 where the device computes it natively), "bf16", "fp16" (GPUs only) or "fp32".
        cluster: settings of the clustering.
        proxies: settings of contrast "proxies".
        selective: settings of contrast "instances".
        augment: settings of the augmentation.
    """

    name: str
    labels: Literal["clusters", "persons", "none"] = "clusters"
    contrast: Literal["clusters", "proxies", "instances"] = "clusters"
    sampler: Literal["cameras", "balanced", "proxies", "all"] = "cameras"
    aggregate: Literal["mean", "cameras"] = "mean"
    student: bool = True
    parts: Annotated[int, Field(ge=2, le=16)] = 2
    local_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 8
    iters: Annotated[int, Field(ge=1, le=1_000_000)] = 80
    batch: Annotated[int, Field(ge=2, le=65_536)] = 64
    instances: Annotated[int, Field(ge=1)] = 4
    samples_per_bn: Annotated[int, Field(ge=0)] = 64
    accumulate: Annotated[int, Field(ge=1)] = 1
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: Annotated[float, Field(gt=0, lt=1)] = 3.5e-4
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    warmup: Annotated[int, Field(ge=0)] = 0
    lr_steps: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.7,)
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 0.1
    temperature: Annotated[float, Field(gt=0, le=1)] = 0.05
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.1
    local_loss_weight: Annotated[float, Field(ge=0, lt=1)] = 0.2
    guidance: Annotated[float, Field(ge=0)] = 1.0
    relation: Annotated[float, Field(ge=0)] = 0.0
    teacher_batch_norm: Literal["batch", "running"] = "batch"
    precision: Precision = "auto"
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    proxies: ProxySettings = field(default_factory=ProxySettings)
    selective: SelectiveSettings = field(default_factory=SelectiveSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)

    @model_validator(mode="after")
    def _check_together(self) -> Recipe:
        """Check values that depend on each other."""
        if self.instances > self.batch:
            raise ValueError(f"instances is {self.instances}, expected at most batch, {self.batch}")
        if self.accumulate > self.batch:
            raise ValueError(f"accumulate is {self.accumulate}, expected at most batch, {self.batch}")
        if self.samples_per_bn == 1:
            raise ValueError("samples_per_bn is 1, expected 0 (the whole batch) or at least 2")
        if not (self.contrast == "instances") == (self.labels == "none") == (self.sampler == "all"):
            raise ValueError(
                f"contrast is {self.contrast!r}, labels {self.labels!r} and sampler {self.sampler!r}, expected "
                "'instances', 'none' and 'all' together or none of them"
            )
        return self

    def to_json(self) -> dict[str, Any]:
        """All settings as plain values."""
        return asdict(self)

    def with_schedule(self, *, epochs: int | None = None, iters: int | None = None) -> Recipe:
        """The same method with another number of epochs or iterations; ``None`` keeps the recipe's value.

        Raises:
            RecipeError: a value out of range.
        """
        schedule = {"epochs": epochs or self.epochs, "iters": iters or self.iters}
        return parse_recipe(self.name, {**self.to_json(), **schedule})

    def with_student(self) -> Recipe:
        """The same method with a student of another architecture, distilled by features and by relations."""
        weights = {"guidance": self.guidance or 1.0, "relation": self.relation or 1.0}
        return parse_recipe(self.name, {**self.to_json(), "student": True, **weights})


SECTIONS: Mapping[str, type[Any]] = {
    "cluster": ClusterSettings,
    "proxies": ProxySettings,
    "selective": SelectiveSettings,
    "augment": AugmentSettings,
}
PUBLISHED = "published"  # the table of a recipe with the paper's own schedule


def recipe_names() -> list[str]:
    """Names of the recipes that ship with resight."""
    folder = resources.files("resight.training") / "recipes"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def load_recipe(name: str, *, published: bool = False) -> Recipe:
    """Read a recipe by name.

    Args:
        name: one of `recipe_names`.
        published: whether to use the values of its paper instead of those chosen for small encoders and machines.

    Raises:
        RecipeError: no such recipe, an unknown key or a value out of range.
    """
    if name not in recipe_names():
        raise RecipeError(
            f"unknown recipe {name!r}{suggestion(name, recipe_names())}: expected one of {', '.join(recipe_names())}"
        )
    text = (resources.files("resight.training") / "recipes" / f"{name}.toml").read_text()
    values = tomllib.loads(text)
    paper = values.pop(PUBLISHED, None)
    if published and paper is None:
        raise RecipeError(f"recipe {name!r} is not from a paper and has no published values: omit --published")
    return parse_recipe(name, _merged(values, paper) if published else values)


def _merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Values overridden by those of another table, section by section."""
    nested = {key: {**values.get(key, {}), **value} for key, value in over.items() if isinstance(value, Mapping)}
    return {**values, **over, **nested}


def parse_recipe(name: str, values: Mapping[str, Any]) -> Recipe:
    """Parse the content of a TOML file into a recipe.

    Raises:
        RecipeError: an unknown key, (suggests the closest known one), or a value of the wrong type or out of range.
    """
    try:
        # As JSON, since pydantic then takes lists for tuples and tables for sections, and stays strict with numbers.
        return TypeAdapter(Recipe).validate_json(json.dumps({**values, "name": name}, default=str))
    except ValidationError as error:
        problem = first_problem(error)
        raise RecipeError(f"recipe {name!r}: {_describe(problem)}; see docs/method.md", field=problem.key) from error


def _describe(problem: Problem) -> str:
    """What was expected and what was found."""
    *sections, key = problem.location or ("",)
    if problem.kind == "unknown":
        known = [one.name for one in fields(SECTIONS[str(sections[0])] if sections else Recipe)]
        return f"there is no setting {problem.key!r}{suggestion(str(key), known)}"
    if problem.kind == "missing":
        return f"{problem.key} is missing"
    return f"{problem.key}: {problem.reason}" if problem.key else problem.reason


def change_recipe(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """The recipe with some values replaced, each "key=value" or "section.key=value", the value in TOML syntax.

    Raises:
        RecipeError: no "=", a value that is not TOML, an unknown key or a value out of range.
    """
    values = recipe.to_json()
    for change in changes:
        key, equals, text = change.partition("=")
        *sections, name = key.strip().split(".")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(
                f"--set {change!r} cannot be parsed ({error}): expected KEY=VALUE with a value in TOML syntax, for "
                "instance iters=40, cluster.eps=0.5 or sampler='\"proxies\"'",
                field=key,
            ) from error
        table = values
        for section in sections:
            table = table.get(section)  # type: ignore[assignment]
            if not isinstance(table, dict):
                raise RecipeError(f"recipe {recipe.name!r} has no section {section!r}", field=key)
        if not equals or isinstance(table.get(name), dict):
            raise RecipeError(f"--set {change!r}: expected KEY=VALUE, for instance cluster.eps=0.5", field=key)
        table[name] = value
    return parse_recipe(recipe.name, {key: value for key, value in values.items() if key != "name"})


def views_used(recipe: Recipe) -> int | None:
    """Number of trained views, None for all: the end of a slice."""
    return None if recipe.local_loss_weight > 0 or recipe.contrast == "instances" else 1
