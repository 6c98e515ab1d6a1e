from importlib import resources

import pytest

from resight.errors import RecipeError
from resight.training.recipe import load_recipe, parse_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_comments_every_value(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    text = (resources.files("resight.training") / "recipes" / f"{name}.toml").read_text()
    assert text.startswith("#")


def test_purify_holds_the_papers_weights() -> None:
    recipe = load_recipe("purify")
    assert (recipe.local_loss_weight, recipe.guidance, recipe.cluster.local_weight) == (0.2, 1.0, 0.15)
    assert (recipe.temperature, recipe.momentum, recipe.cluster.k1, recipe.cluster.k2) == (0.05, 0.1, 30, 6)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'purify'"):
        load_recipe("purfy")


@pytest.mark.parametrize(
    "values, word",
    [
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"cluster": {"min_sample": 1}}, "did you mean 'min_samples'"),
        ({"augment": {"blur": 1}}, "no setting 'blur'"),
    ],
)
def test_unknown_keys_are_refused(values: dict, word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        parse_recipe("mine", values)


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0},
        {"batch": 1},
        {"lr": 2.0},
        {"temperature": 0.0},
        {"momentum": 1.5},
        {"cluster": {"eps": 1.0}},
        {"cluster": {"local_weight": 0.5}},
        {"instances": 100},
    ],
)
def test_values_out_of_range_are_refused(values: dict) -> None:
    with pytest.raises(RecipeError, match="out of range"):
        parse_recipe("mine", values)


def test_a_schedule_changes_nothing_else() -> None:
    recipe = load_recipe("purify")
    short = recipe.with_schedule(epochs=2, iters=3)
    assert (short.epochs, short.iters) == (2, 3)
    assert recipe.with_schedule() == recipe
    assert short.with_schedule(epochs=recipe.epochs, iters=recipe.iters) == recipe
