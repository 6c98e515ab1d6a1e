"""Recipes: every setting of an adaptation in one TOML file, resolved once into frozen dataclasses."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from typing import Any, Literal, TypeVar

from resight.errors import RecipeError
from resight.training.augment import AugmentSettings
from resight.training.cluster import ClusterSettings

T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """One method with every value; the TOML files say where each comes from.

    Attributes:
        name: the recipe's name.
        labels: "clusters" (none needed) or "persons" (supervised).
        student: whether a second model is trained under the guidance of the first.
        epochs: rounds of labelling and training, in each stage.
        iters: batches an epoch.
        batch: crops a batch.
        instances: crops of one cluster in a batch.
        lr: learning rate of Adam.
        weight_decay: L2 penalty of Adam.
        lr_steps: fractions of the epochs after which the rate is multiplied by lr_decay.
        lr_decay: factor of each step.
        temperature: tau of the contrast.
        momentum: m of the memories.
        local_loss_weight: LP's lambda_2; 0 trains the global view alone.
        guidance: LP's mu, the weight of distillation in the student.
        teacher_batch_norm: "batch" (statistics of the current batch, as released) or "running".
        precision: "auto" (bfloat16 where the device computes it natively), "bf16" or "fp32".
        cluster: how labels are found.
        augment: how crops are varied.
    """

    name: str
    labels: Literal["clusters", "persons"] = "clusters"
    student: bool = True
    epochs: int = 8
    iters: int = 80
    batch: int = 64
    instances: int = 4
    lr: float = 3.5e-4
    weight_decay: float = 5e-4
    lr_steps: tuple[float, ...] = (0.7,)
    lr_decay: float = 0.1
    temperature: float = 0.05
    momentum: float = 0.1
    local_loss_weight: float = 0.2
    guidance: float = 1.0
    teacher_batch_norm: Literal["batch", "running"] = "batch"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)

    def __post_init__(self) -> None:
        bounds = {
            "epochs": 1 <= self.epochs <= 10_000,
            "iters": 1 <= self.iters <= 1_000_000,
            "batch": 2 <= self.batch <= 65_536,
            "instances": 1 <= self.instances <= self.batch,
            "lr": 0 < self.lr < 1,
            "momentum": 0 <= self.momentum <= 1,
            "temperature": 0 < self.temperature <= 1,
            "local_loss_weight": 0 <= self.local_loss_weight < 1,
            "guidance": self.guidance >= 0,
            "cluster.eps": self.cluster.eps == "auto" or 0 < float(self.cluster.eps) < 1,
            "cluster.local_weight": 0 <= self.cluster.local_weight < 0.5,
            "cluster.k1": self.cluster.k1 >= 2,
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


def recipe_names() -> list[str]:
    """The recipes that ship with resight."""
    folder = resources.files("resight.training") / "recipes"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def load_recipe(name: str) -> Recipe:
    """Read a recipe by name.

    Raises:
        RecipeError: no such recipe, an unknown key or a value out of range.
    """
    if name not in recipe_names():
        raise RecipeError(
            f"unknown recipe {name!r}{_nearest(name, recipe_names())}: expected one of {', '.join(recipe_names())}"
        )
    text = (resources.files("resight.training") / "recipes" / f"{name}.toml").read_text()
    return parse_recipe(name, tomllib.loads(text))


def parse_recipe(name: str, values: Mapping[str, Any]) -> Recipe:
    """Turn the content of a TOML file into a recipe.

    Raises:
        RecipeError: an unknown key, with the nearest known one, or a value out of range.
    """
    values = dict(values)
    cluster = _section(ClusterSettings, values.pop("cluster", {}), name)
    augment = _section(AugmentSettings, values.pop("augment", {}), name)
    return _section(Recipe, {**values, "name": name, "cluster": cluster, "augment": augment}, name)


def _section(kind: type[T], values: Mapping[str, Any], recipe: str) -> T:
    """Build one dataclass, refusing keys it does not have."""
    known = [entry.name for entry in fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise RecipeError(f"recipe {recipe!r} has no setting {key!r}{_nearest(key, known)}", field=key)
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _nearest(name: str, known: list[str]) -> str:
    """A suggestion, where one is near."""
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
