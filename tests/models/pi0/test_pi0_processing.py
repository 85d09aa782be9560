"""Images, prompts and scaling of pi0, and what is said about wrong observations."""

import numpy as np
import pytest
from PIL import Image
from tiny_pi0 import STATE, make, make_config, observation, statistics

from checks import near
from vla_pruner.models.pi0.processing import (
    check_images,
    prepare_image,
    prompt,
    scale,
    tokenize,
)


def test_images_keep_their_shape_and_get_black_margins():
    config = make_config()
    wide = np.full((20, 40, 3), 200, dtype=np.uint8)
    found = prepare_image(wide, config)
    assert found.shape == (42, 42, 3)
    assert (found[:10] == 0).all() and (found[-10:] == 0).all() and (found[11:31] == 200).all()
    assert (prepare_image(None, config) == 0).all()


def test_an_image_of_the_right_size_is_not_touched():
    image = observation()["images"][0]
    assert (prepare_image(image, make_config()) == image).all()


def test_a_crop_shows_the_middle():
    image = np.zeros((84, 84, 3), dtype=np.uint8)
    image[21:63, 21:63] = 100
    assert (prepare_image(image, make_config(crop_area=0.25, resample="lanczos")) == 100).all()


def test_pixels_span_minus_one_to_one():
    seen = observation()
    seen["images"] = [np.zeros((42, 42, 3), np.uint8), np.full((42, 42, 3), 255, np.uint8)]
    inputs = make().prepare([seen])
    assert (inputs.images[0, 0] == -1).all() and (inputs.images[0, 1] == 1).all()
    assert inputs.image_mask.tolist() == [[True, True]]


def test_the_prompt_of_pi0():
    assert prompt(" pick_up\nit ", np.zeros(7), make_config()) == "pick up it\n"


def test_the_prompt_of_pi05_holds_the_state():
    state = np.array([-1.0, -0.999, 0.0, 1.0, -3.0, 3.0, 0.0])
    config = make_config("pi05")
    assert prompt("go", state, config) == "Task: go, State: 0 0 128 255 -1 255 128;\nAction: "
    short = make_config("pi05", pad_state=False)
    assert prompt("go", state, short) == "Task: go, State: 0 0 128 255;\nAction: "


def test_prompts_are_padded_or_cut_on_the_right():
    def words(text):
        return {"input_ids": [7] * len(text.split())}

    tokens, mask = tokenize(["a b c", "a"], words, None)
    assert tokens.tolist() == [[7, 7, 7], [7, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    tokens, mask = tokenize(["a b c"], words, 2)
    assert tokens.tolist() == [[7, 7]] and mask.all()
    assert tokenize(["a b c"], words, 5)[0].shape == (1, 5)


@pytest.mark.parametrize("scaling", ["quantiles", "mean-std", "min-max", "identity"])
def test_scaling_is_undone(scaling):
    made = scale(make_config(state_scaling=scaling), "state")
    values = np.random.default_rng(0).normal(size=(3, STATE))
    np.testing.assert_allclose(made.unnormalise(made.normalise(values)), values)


def test_scales_by_hand():
    state = {name: np.array(v) for name, v in statistics()["state"].items()}
    ends = scale(make_config(state_scaling="quantiles"), "state")
    near(ends.normalise(state["q01"]), -1)
    near(ends.normalise(state["q99"]), 1)
    ends = scale(make_config(state_scaling="min-max"), "state")
    near(ends.normalise(state["max"]), 1)
    gauss = scale(make_config(state_scaling="mean-std"), "state")
    near(gauss.normalise(state["mean"] + state["std"]), 1)


def test_statistics_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"no mean/std of the action.*action_scaling=\"identity\""):
        scale(make_config(norm_stats={}), "action")
    wrong = {"state": {"mean": [0.0], "std": [1.0]}}
    with pytest.raises(ValueError, match=r"\(1,\) and \(1,\) entries; this policy has 4"):
        scale(make_config(norm_stats=wrong), "state")


def test_images_come_as_lists_dicts_or_pil():
    array = observation()["images"][0]
    one, two = check_images([Image.fromarray(array), None], ("a", "b"))
    assert (one == array).all() and two is None
    assert check_images({"b": array}, ("a", "b"))[0] is None
    assert len(check_images(array, ("a",))) == 1


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"images": {"top": None}}, ValueError, "no camera top; it has front, left"),
        ({"images": "photo"}, TypeError, "got str"),
        ({"images": [np.zeros((4, 4, 3), np.uint8)]}, ValueError, "2 camera.*got 1"),
        ({"images": [None, None]}, ValueError, "every camera is missing"),
        ({"images": [np.zeros((4, 4, 3)), None]}, TypeError, "front has dtype float64"),
        ({"images": [None, np.zeros((4, 4), np.uint8)]}, ValueError, r"left has shape \(4, 4\)"),
        ({"images": [None, 3]}, TypeError, "left must be a numpy array"),
        ({"instruction": " "}, ValueError, "instruction is empty"),
        ({"instruction": 3}, TypeError, "must be a string"),
        ({"proprio": None}, ValueError, "give `proprio` with 4 numbers"),
        ({"proprio": np.zeros(3)}, ValueError, r"shape \(3,\); expected \(4,\)"),
        ({"proprio": np.full(4, np.nan)}, ValueError, "not finite"),
        ({"goal": 1}, ValueError, r"unknown entries \['goal'\]"),
    ],
)
def test_wrong_observations_are_explained(changes, error, match):
    with pytest.raises(error, match=match):
        make().predict_actions([observation() | changes])


def test_no_observation_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        make().predict_actions([])
    with pytest.raises(TypeError, match="an observation is a dict"):
        make().predict_actions([3])
