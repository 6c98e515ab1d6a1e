"""Recipes: all settings of an adaptation in one TOML file, parsed into frozen dataclasses."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from resight.errors import RecipeError
from resight.training.adaptation.batches import AugmentSettings
from resight.training.clustering.cluster import ClusterSettings
from resight.training.features.extract import Precision

T = TypeVar("T")


@dataclass(frozen=True)
class ProxySettings:
    """Camera-aware proxies (O2CAP); the defaults are those of the released code.

    Attributes:
        offline: weight of the loss by cluster labels.
        online: weight of the loss by current similarities; 0 disables it.
        positives: number of proxies attracted to by the online loss, at most one per camera.
        negatives: number of most similar other proxies repelled from, in each loss.
        balance: w, weight of the sample's own similarity in selecting online positives; its proxy's has 1 - w.
    """

    offline: float = 1.0
    online: float = 1.0
    positives: int = 3
    negatives: int = 50
    balance: float = 0.15


@dataclass(frozen=True)
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

    neighbours: int = 7
    negatives: int = 500
    self_share: float = 0.5
    neighbour_gain: float = 1.75
    local_loss: float = 0.3
    camera_penalty: float = 0.05
    warmup_epochs: int = 3
    mixture: Literal["zeros", "features"] = "zeros"


@dataclass(frozen=True)
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
    parts: int = 2
    local_share: float = 0.0
    epochs: int = 8
    iters: int = 80
    batch: int = 64
    instances: int = 4
    samples_per_bn: int = 64
    accumulate: int = 1
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 3.5e-4
    weight_decay: float = 5e-4
    warmup: int = 0
    lr_steps: tuple[float, ...] = (0.7,)
    lr_decay: float = 0.1
    temperature: float = 0.05
    momentum: float = 0.1
    local_loss_weight: float = 0.2
    guidance: float = 1.0
    relation: float = 0.0
    teacher_batch_norm: Literal["batch", "running"] = "batch"
    precision: Precision = "auto"
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    proxies: ProxySettings = field(default_factory=ProxySettings)
    selective: SelectiveSettings = field(default_factory=SelectiveSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)

    def __post_init__(self) -> None:
        bounds = {
            "epochs": 1 <= self.epochs <= 10_000,
            "iters": 1 <= self.iters <= 1_000_000,
            "batch": 2 <= self.batch <= 65_536,
            "instances": 1 <= self.instances <= self.batch,
            "samples_per_bn": self.samples_per_bn == 0 or self.samples_per_bn >= 2,
            "accumulate": 1 <= self.accumulate <= self.batch,
            "parts": 2 <= self.parts <= 16,
            "local_share": 0 <= self.local_share < 1,
            "lr": 0 < self.lr < 1,
            "warmup": self.warmup >= 0,
            "momentum": 0 <= self.momentum <= 1,
            "temperature": 0 < self.temperature <= 1,
            "local_loss_weight": 0 <= self.local_loss_weight < 1,
            "guidance": self.guidance >= 0,
            "relation": self.relation >= 0,
            "proxies.positives": self.proxies.positives >= 1,
            "proxies.negatives": self.proxies.negatives >= 1,
            "selective.neighbours": self.selective.neighbours >= 0,
            "selective.negatives": self.selective.negatives >= 1,
            "contrast": (self.contrast == "instances") == (self.labels == "none") == (self.sampler == "all"),
            "cluster.eps": self.cluster.eps == "auto" or 0 < float(self.cluster.eps) < 1,
            "cluster.local_weight": 0 <= self.cluster.local_weight < 0.5,
            "cluster.k1": self.cluster.k1 >= 2,
            "cluster.k2": self.cluster.k2 >= 1,
            "cluster.min_samples": self.cluster.min_samples >= 1,
            "cluster.k1_intra": self.cluster.k1_intra >= 1,
            "cluster.k1_inter": self.cluster.k1_inter >= 1,
            "cluster.k2_intra": self.cluster.k2_intra >= 1,
            "cluster.k2_inter": self.cluster.k2_inter >= 0,
        }
        wrong = [name for name, holds in bounds.items() if not holds]
        if wrong:
            raise RecipeError(
                f"recipe {self.name!r}: {', '.join(wrong)} out of range; see docs/method.md", field=wrong[0]
            )

    def to_json(self) -> dict[str, Any]:
        """All settings as plain values."""
        return asdict(self)

    def with_schedule(self, *, epochs: int | None = None, iters: int | None = None) -> Recipe:
        """The same method with another number of epochs or iterations; ``None`` keeps the recipe's value."""
        return replace(self, epochs=epochs or self.epochs, iters=iters or self.iters)

    def with_student(self) -> Recipe:
        """The same method with a student of another architecture, distilled by features and by relations."""
        return replace(self, student=True, guidance=self.guidance or 1.0, relation=self.relation or 1.0)


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
            f"unknown recipe {name!r}{_nearest(name, recipe_names())}: expected one of {', '.join(recipe_names())}"
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
        RecipeError: an unknown key (suggests the closest known one) or a value out of range.
    """
    values = dict(values)
    sections = {key: _section(kind, values.pop(key, {}), name) for key, kind in SECTIONS.items()}
    return _section(Recipe, {**values, "name": name, **sections}, name)


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


def _section(kind: type[T], values: Mapping[str, Any], recipe: str) -> T:
    """Build one dataclass, refusing unknown keys and values of the wrong type."""
    known = get_type_hints(kind)
    resolved = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    for key, value in resolved.items():
        if key not in known:
            raise RecipeError(f"recipe {recipe!r} has no setting {key!r}{_nearest(key, list(known))}", field=key)
        if not _fits(value, known[key]):
            expected = str(known[key]).replace("typing.", "") if get_args(known[key]) else known[key].__name__
            raise RecipeError(f"recipe {recipe!r}: {key} is {value!r}, expected {expected}", field=key)
    return kind(**resolved)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a TOML value matches the type of a setting: a Literal, a number, a list of numbers."""
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return value in inner
    if get_origin(kind) is tuple:
        kinds = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is ... else inner
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if inner:  # a union
        return any(_fits(value, one) for one in inner)
    return isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) <= (kind is bool)


def _nearest(name: str, known: list[str]) -> str:
    """The closest known name as a suggestion, or nothing."""
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def views_used(recipe: Recipe) -> int | None:
    """Number of trained views, None for all: the end of a slice."""
    return None if recipe.local_loss_weight > 0 or recipe.contrast == "instances" else 1
