from importlib import resources

import pytest

from resight.errors import RecipeError
from resight.training.adaptation.recipe import change_recipe, load_recipe, parse_recipe, recipe_names


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


def test_every_value_of_a_recipe_has_a_comment() -> None:
    for name in recipe_names():
        text = (resources.files("resight.training") / "recipes" / f"{name}.toml").read_text()
        commented = False  # "as all of the following": the comment also covers the lines below without one
        for line in text.splitlines():
            if "=" not in line.partition("#")[0]:
                commented = "as all of the following" in line
                continue
            commented = ("as all of the following" in line) or (commented and "#" not in line)
            assert commented or "#" in line, f"{name}: {line}"


def test_published_values_replace_those_for_small_machines() -> None:
    lp, cc, o2 = (load_recipe(name, published=True) for name in ("purify", "cluster-contrast", "o2cap"))
    for recipe in (lp, cc):
        assert (recipe.epochs, recipe.iters, recipe.batch, recipe.instances) == (50, 200, 256, 16)
        assert (recipe.samples_per_bn, recipe.lr, recipe.lr_steps, recipe.cluster.eps) == (64, 3.5e-4, (0.4, 0.8), 0.6)
        assert (recipe.temperature, recipe.momentum) == (0.05, 0.1) and not recipe.cluster.centre_cameras
    assert (lp.student, cc.student, lp.local_loss_weight, cc.local_loss_weight) == (True, False, 0.2, 0.0)
    assert (o2.epochs, o2.iters, o2.batch, o2.instances, o2.samples_per_bn) == (50, 400, 32, 4, 32)
    assert (o2.warmup, o2.sampler, o2.aggregate, o2.temperature, o2.momentum) == (10, "proxies", "cameras", 0.07, 0.2)
    assert (o2.cluster.k1, o2.cluster.k2, o2.cluster.eps) == (20, 6, 0.5)
    sc = load_recipe("selective", published=True)
    assert (sc.batch, sc.optimizer, sc.lr, sc.epochs, sc.selective.warmup_epochs) == (8, "sgd", 1e-3, 50, 3)
    assert sc.selective.mixture == "zeros"
    assert (sc.parts, sc.local_share, sc.selective.local_loss, sc.selective.negatives) == (8, 0.5, 0.3, 500)
    with pytest.raises(RecipeError, match="omit --published"):
        load_recipe("purify-camera", published=True)


def test_a_student_of_another_architecture_also_uses_relations() -> None:
    recipe = load_recipe("o2cap").with_student()
    assert recipe.student and recipe.guidance == 1.0 and recipe.relation == 1.0


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'purify'"):
        load_recipe("purfy")


@pytest.mark.parametrize(
    "values, word",
    [
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"cluster": {"min_sample": 1}}, "did you mean 'min_samples'"),
        ({"augment": {"blur": 1}}, "no setting 'augment.blur'"),
    ],
)
def test_unknown_keys_are_refused(values: dict, word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        parse_recipe("mine", values)


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"epochs": 0}, "epochs: expected greater than or equal to 1, found 0"),
        ({"batch": 1}, "batch: expected greater than or equal to 2, found 1"),
        ({"lr": 2.0}, "lr: expected less than 1, found 2.0"),
        ({"lr": float("nan")}, "lr: expected less than 1, found nan"),
        ({"temperature": 0.0}, "temperature: expected greater than 0"),
        ({"momentum": 1.5}, "momentum: expected less than or equal to 1"),
        ({"cluster": {"eps": 1.0}}, "cluster.eps: expected less than 1 or 'auto', found 1.0"),
        ({"cluster": {"local_weight": 0.5}}, "cluster.local_weight: expected less than 0.5"),
        ({"cluster": {"k2": 0}}, "cluster.k2: expected greater than or equal to 1"),
        ({"cluster": {"k1_intra": 0}}, "cluster.k1_intra: expected"),
        ({"augment": {"flip": 1.5}}, "augment.flip: expected less than or equal to 1"),
        ({"instances": 100}, "instances is 100, expected at most batch, 64"),
        ({"accumulate": 100}, "accumulate is 100, expected at most batch, 64"),
        ({"samples_per_bn": 1}, "samples_per_bn is 1, expected 0"),
        ({"accumulate": 0}, "accumulate: expected greater than or equal to 1"),
        ({"parts": 1}, "parts: expected greater than or equal to 2"),
        ({"labels": "none"}, "expected 'instances', 'none' and 'all' together"),
        ({"contrast": "instances"}, "expected 'instances', 'none' and 'all' together"),
        ({"proxies": {"positives": 0}}, "proxies.positives: expected"),
        ({"selective": {"negatives": 0}}, "selective.negatives: expected"),
    ],
)
def test_values_out_of_range_are_refused(values: dict, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        parse_recipe("mine", values)


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"batch": "64"}, "batch: expected a valid integer, found '64'"),
        ({"batch": 64.0}, "batch: expected a valid integer, found 64.0"),
        ({"batch": True}, "batch: expected a valid integer, found True"),
        ({"sampler": "camera"}, "sampler: expected 'cameras', 'balanced', 'proxies' or 'all', found 'camera'"),
        ({"lr_steps": 0.7}, "lr_steps: expected a valid array, found 0.7"),
        ({"lr_steps": ["0.7"]}, r"lr_steps\[0\]: expected a valid number, found '0.7'"),
        ({"augment": {"erase_area": [0.1]}}, r"augment.erase_area\[1\] is missing"),
        ({"cluster": {"eps": "small"}}, "cluster.eps: expected a valid number or 'auto', found 'small'"),
        ({"cluster": 3}, "cluster: expected an object, found 3"),
    ],
)
def test_values_of_another_type_are_refused(values: dict, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        parse_recipe("mine", values)


def test_a_schedule_out_of_range_is_refused() -> None:
    with pytest.raises(RecipeError, match="epochs: expected greater than or equal to 1, found -1"):
        load_recipe("purify").with_schedule(epochs=-1)


def test_a_schedule_changes_nothing_else() -> None:
    recipe = load_recipe("purify")
    short = recipe.with_schedule(epochs=2, iters=3)
    assert (short.epochs, short.iters) == (2, 3)
    assert recipe.with_schedule() == recipe
    assert short.with_schedule(epochs=recipe.epochs, iters=recipe.iters) == recipe


def test_single_values_are_changed_in_toml_syntax() -> None:
    recipe = load_recipe("o2cap")
    changed = change_recipe(
        recipe, ["iters=40", "cluster.eps = 0.5", 'sampler="proxies"', "student=true", "lr_steps=[0.5, 0.9]"]
    )
    assert (changed.iters, changed.cluster.eps, changed.sampler, changed.student) == (40, 0.5, "proxies", True)
    assert changed.lr_steps == (0.5, 0.9) and changed.name == "o2cap" and changed.proxies == recipe.proxies
    assert change_recipe(recipe, []) == recipe


@pytest.mark.parametrize(
    "change, word",
    [
        ("iters", "KEY=VALUE"),
        ("iters=many", "cannot be parsed"),
        ("epoch=3", "did you mean 'epochs'"),
        ("cluster.epsilon=0.5", "no setting 'cluster.epsilon'"),
        ("clusters.eps=0.5", "no section 'clusters'"),
        ("iters.eps=0.5", "no section 'iters'"),
        ("cluster=3", "KEY=VALUE"),
        ("lr=2.0", "lr: expected less than 1"),
    ],
)
def test_invalid_changes_are_refused(change: str, word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        change_recipe(load_recipe("o2cap"), [change])
