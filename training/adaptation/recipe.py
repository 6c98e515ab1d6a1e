"""Recipes: every setting of an adaptation in one TOML file, resolved once into frozen dataclasses."""

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
        online: weight of the loss by current similarities; 0 leaves it out.
        positives: proxies pulled to by the online loss, one a camera at most.
        negatives: most similar other proxies pushed from, in each loss.
        balance: w, how much the sample itself says in choosing its online positives; its proxy says the rest.
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
        neighbours: P, positives beside oneself.
        negatives: N_n, the nearest others behind them.
        self_share: lambda_t, weight of one's own entry.
        neighbour_gain: alpha, raises the weight of the neighbours.
        local_loss: lambda_p, share of the loss on the stripes.
        camera_penalty: lambda_c, distance added between crops of one camera when neighbours are chosen.
        warmup_epochs: epochs of instance discrimination before neighbours are trusted.
        mixture: what the mixture bank begins with: "zeros" or the crops' global "features".
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
    """One method with every value; the TOML files say where each comes from.

    Attributes:
        name: the recipe's name.
        labels: "clusters" (none needed), "persons" (supervised) or "none": every crop is its own entry.
        contrast: what a crop is contrasted with: "clusters", "proxies" (clusters parted by camera) or "instances".
        sampler: how batches are drawn: "cameras" (K crops of a cluster, partners from other cameras), "balanced" (K
            crops of a cluster, as even over its cameras as can be), "proxies" (K crops of a proxy) or "all" (shuffled).
        aggregate: "mean" over the batch, or the sum of each camera's mean ("cameras").
        student: whether a second model is trained under the guidance of the first.
        parts: horizontal stripes with heads of their own; 2 are LP's upper and lower half.
        local_share: share of the stripes in the model's feature; 0: the global view alone.
        epochs: rounds of labelling and training, in each stage.
        iters: batches an epoch.
        batch: crops a batch.
        instances: crops of one cluster (or proxy) in a batch.
        samples_per_bn: crops a batch norm takes its statistics of; 0 for the whole batch.
        accumulate: parts a batch is computed in, to save memory.
        optimizer: "adam" or "sgd" (Nesterov, momentum 0.9).
        lr: learning rate.
        weight_decay: L2 penalty.
        warmup: epochs in which the rate grows linearly from a hundredth.
        lr_steps: fractions of the epochs after which the rate is multiplied by lr_decay.
        lr_decay: factor of each step.
        temperature: tau of the contrast.
        momentum: m of the memories.
        local_loss_weight: LP's lambda_2; 0 trains the global view alone.
        guidance: LP's mu, the weight of feature distillation in the student.
        relation: weight of relation distillation in the student.
        teacher_batch_norm: "batch" (statistics of the current batch, as released) or "running".
        precision: "auto" (bfloat16 where the device computes it natively), "bf16", "fp16" (GPUs alone) or "fp32".
        cluster: how labels are found.
        proxies: values of contrast "proxies".
        selective: values of contrast "instances".
        augment: how crops are varied.
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
        """Plain values, every default resolved."""
        return asdict(self)

    def with_schedule(self, *, epochs: int | None = None, iters: int | None = None) -> Recipe:
        """The same method, longer or shorter; ``None`` keeps a value."""
        return replace(self, epochs=epochs or self.epochs, iters=iters or self.iters)

    def with_student(self) -> Recipe:
        """The same method with a student of another architecture, guided by features and by relations."""
        return replace(self, student=True, guidance=self.guidance or 1.0, relation=self.relation or 1.0)


SECTIONS: Mapping[str, type[Any]] = {
    "cluster": ClusterSettings,
    "proxies": ProxySettings,
    "selective": SelectiveSettings,
    "augment": AugmentSettings,
}
PUBLISHED = "published"  # the table of a recipe that holds the paper's own schedule


def recipe_names() -> list[str]:
    """The recipes that ship with resight."""
    folder = resources.files("resight.training") / "recipes"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def load_recipe(name: str, *, published: bool = False) -> Recipe:
    """Read a recipe by name.

    Args:
        name: one of `recipe_names`.
        published: whether the values of its paper replace those chosen for small encoders and machines.

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
        raise RecipeError(f"recipe {name!r} is ours: it has no published values; leave --published out")
    return parse_recipe(name, _merged(values, paper) if published else values)


def _merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Values with those of another table put over them, section by section."""
    nested = {key: {**values.get(key, {}), **value} for key, value in over.items() if isinstance(value, Mapping)}
    return {**values, **over, **nested}


def parse_recipe(name: str, values: Mapping[str, Any]) -> Recipe:
    """Turn the content of a TOML file into a recipe.

    Raises:
        RecipeError: an unknown key, with the nearest known one, or a value out of range.
    """
    values = dict(values)
    sections = {key: _section(kind, values.pop(key, {}), name) for key, kind in SECTIONS.items()}
    return _section(Recipe, {**values, "name": name, **sections}, name)


def change_recipe(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """The recipe with some values replaced, each "key=value" or "section.key=value", the value as TOML writes it.

    Raises:
        RecipeError: no "=", a value TOML cannot read, an unknown key or a value out of range.
    """
    values = recipe.to_json()
    for change in changes:
        key, equals, text = change.partition("=")
        *sections, name = key.strip().split(".")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(
                f"--set {change!r} cannot be read ({error}): expected KEY=VALUE with a value as in a TOML file, for "
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
    """Build one dataclass, refusing keys it does not have."""
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
    """Whether a value of a TOML file is what a setting takes: a word of a Literal, a number, a list of numbers."""
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return value in inner
    if get_origin(kind) is tuple:
        many = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is ... else inner
        return isinstance(value, tuple) and len(value) == len(many) and all(map(_fits, value, many))
    if inner:  # a union
        return any(_fits(value, one) for one in inner)
    return isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) <= (kind is bool)


def _nearest(name: str, known: list[str]) -> str:
    """A suggestion, where one is near."""
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def views_used(recipe: Recipe) -> int | None:
    """How many views are trained, None for all: a slice's end."""
    return None if recipe.local_loss_weight > 0 or recipe.contrast == "instances" else 1
