"""Recipes say where they come from, are read strictly, and fit one model."""

import json
from dataclasses import replace

import pytest

from vla_pruner.methods import build
from vla_pruner.methods.recipe import ModelStamp, Recipe

MODEL = ModelStamp(policy="OpenVLA", layers=4, hidden=64, vocabulary=512, weights="0123456789ab")
VALUES = {
    "fitprune": {"left": [32, 20, 20, 0]},
    "vtw": {"layer": 2},
    "efficientvla": {"importance": [0.5, 0.1, 0.3, 0.2]},
}


class Config:
    hidden_size = 64
    vocab_size = 512


def recipe(method="vtw", keep=None, **values) -> Recipe:
    return Recipe(method=method, model=MODEL, keep=keep, values=values or VALUES[method])


def test_what_is_saved_is_read(tmp_path):
    made = replace(
        recipe("fitprune", keep=0.25),
        observations={"count": 3, "source": "here", "seeds": [1, 2]},
        settings={"alpha": 0.5},
        environment={"torch": "2.13"},
    )
    made.save(tmp_path / "new" / "recipe.json")
    assert Recipe.load(tmp_path / "new" / "recipe.json") == made
    assert json.loads((tmp_path / "new" / "recipe.json").read_text())["model"]["layers"] == 4


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="vla-pruner calibrate"):
        build("vtw", recipe=tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: "not json", "Expecting value"),
        (lambda found: [found], "a recipe must be dict"),
        (lambda found: found | {"format": 2}, "format 2, this version reads 1"),
        (lambda found: found | {"colour": "red"}, "unknown entries colour"),
        (lambda found: {k: v for k, v in found.items() if k != "values"}, "no entry values"),
        (lambda found: found | {"model": "OpenVLA"}, "model must be dict"),
        (lambda found: found | {"model": {"layers": 4}}, "no entry hidden, policy"),
        (lambda found: found | {"model": found["model"] | {"layers": "4"}}, "layers must be int"),
        (lambda found: found | {"model": found["model"] | {"layers": True}}, "layers must be int"),
        (lambda found: found | {"values": [1]}, "values must be Mapping"),
        (lambda found: found | {"keep": "0.25"}, "keep must be int or float"),
    ],
)
def test_anything_else_than_a_recipe_is_refused(tmp_path, change, message):
    path = tmp_path / "recipe.json"
    recipe().save(path)
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(ValueError, match=f"is no calibration recipe: .*{message}"):
        Recipe.load(path)


@pytest.mark.parametrize("method", ["fitprune", "vtw", "efficientvla"])
def test_a_recipe_of_another_method_is_refused(method):
    other = "vtw" if method != "vtw" else "fitprune"
    with pytest.raises(ValueError, match=f"the recipe is for '{other}', not for '{method}'"):
        build(method, recipe=recipe(other))


def test_a_recipe_of_another_budget_is_refused():
    assert build("fitprune", keep=0.5, recipe=recipe("fitprune", keep=0.5)).keep == 0.5
    with pytest.raises(ValueError, match=r"made for keep=0\.5 and `keep=0\.25` is asked"):
        build("fitprune", keep=0.25, recipe=recipe("fitprune", keep=0.5))
    assert build("vtw", keep=0.5, recipe=recipe("vtw")).keep == 0.5


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("fitprune", {"left": [32, 20, 20]}, "one integer for each of 4 layers"),
        ("fitprune", {"left": [32, 20, 20.5, 1]}, "one integer"),
        ("fitprune", {"left": [32, 20, 21, 1]}, "must not grow"),
        ("fitprune", {"left": [32, 20, 20, -1]}, "must not grow"),
        ("fitprune", {"left": [0, 0, 0, 0]}, "must not grow"),
        ("fitprune", {"layer": 3}, "`left` must hold"),
        ("vtw", {"layer": 0}, "`layer` must be an integer of at least 1"),
        ("vtw", {"layer": True}, "`layer` must be"),
        ("vtw", {"left": [1]}, "`layer` must be"),
        ("efficientvla", {"importance": [0.1, 0.2, 0.3]}, "one number for each of 4 layers"),
        ("efficientvla", {"importance": [0.1, 0.2, 0.3, float("nan")]}, "one number"),
    ],
)
def test_values_that_make_no_sense_are_refused(method, values, message):
    with pytest.raises(ValueError, match=message):
        build(method, recipe=recipe(method, **values))


@pytest.mark.parametrize("method", ["fitprune", "vtw", "efficientvla"])
def test_a_model_of_other_sizes_is_refused_by_its_configuration(method):
    options = {"parts": "layers"} if method == "efficientvla" else {}
    calibrated = build(method, recipe=recipe(method), **options)
    calibrated.check(Config, 4)
    calibrated.check(None, 4)
    with pytest.raises(ValueError, match=r"another model \(layers 4 instead of 5\)"):
        calibrated.check(Config, 5)
    for name, what in {"hidden_size": "hidden size 64", "vocab_size": "vocabulary 512"}.items():
        other = type("Other", (Config,), {name: 7})
        with pytest.raises(ValueError, match=f"{what} instead of 7"):
            calibrated.check(other, 4)


def test_another_class_or_other_weights_are_refused():
    calibrated = build("vtw", recipe=recipe())
    calibrated.check_model(MODEL)
    with pytest.raises(ValueError, match=r"class OpenVLA instead of OpenVLAOFT"):
        calibrated.check_model(replace(MODEL, policy="OpenVLAOFT"))
    tuned = replace(MODEL, weights="ba9876543210")
    with pytest.raises(ValueError, match="other_weights=True"):
        calibrated.check_model(tuned)
    tolerant = build("vtw", recipe=recipe(), other_weights=True)
    tolerant.check_model(tuned)
    with pytest.raises(ValueError, match="class"):
        tolerant.check_model(replace(tuned, policy="OpenVLAOFT"))


@pytest.mark.parametrize("method", ["fitprune", "vtw"])
def test_a_method_without_its_recipe_says_how_to_get_one(method):
    bare = build(method)
    assert bare.wants_recipe
    for ask in (lambda: bare.check(Config, 4), lambda: bare.cuts(4)):
        with pytest.raises(ValueError, match=f"vla-pruner calibrate {method}"):
            ask()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"recipe": 3}, "must be a path or a Recipe"), ({"other_weights": "no"}, "True or False")],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("vtw", **options)
