"""Observations in, actions out: images, prompts, normalisation, and errors that help."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_openvla import make_oft, make_openvla, observation, picture, sizes, tokenizer

from checks import near
from vla_pruner.models.openvla import OpenVLAConfig, OpenVLAOFTConfig
from vla_pruner.models.openvla import processing as P

CONFIG = OpenVLAConfig(**sizes())


# ---------------------------------------------------------------------- images
def bilinear_at(image: np.ndarray, row: float, column: float) -> np.ndarray:
    top, left = int(np.floor(row)), int(np.floor(column))
    bottom, right = int(np.ceil(row)), int(np.ceil(column))
    high = image[top, left] + (image[top, right] - image[top, left]) * (column - left)
    low = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (column - left)
    return high + (low - high) * (row - top)


def test_centre_crop_samples_from_edge_to_edge_of_the_middle() -> None:
    image = picture(0, 24, 24)
    side = 0.9**0.5
    start, step = (1 - side) / 2 * 23, side * 23 / 23
    cropped = P.crop_and_stretch(image, 0.9)
    for row, column in [(0, 0), (23, 23), (5, 17), (12, 12)]:
        exact = bilinear_at(image.astype(float), start + row * step, start + column * step)
        assert np.abs(cropped[row, column] - exact).max() <= 1
    assert P.crop_and_stretch(image, 1.0).tolist() == image.tolist()


@pytest.mark.parametrize("value", [0, 1, 128, 254, 255])
def test_centre_crop_keeps_flat_colours(value: int) -> None:
    flat = np.full((16, 16, 3), value, dtype=np.uint8)
    assert (P.crop_and_stretch(flat, 0.9) == value).all()


def test_images_are_resized_then_cropped_or_the_other_way_round() -> None:
    image = picture(1, 64, 80)
    resized = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.LANCZOS))
    assert (P.prepare_image(image, 32, center_crop=False) == resized).all()
    cropped = P.prepare_image(image, 32, center_crop=True)
    assert (cropped == P.crop_and_stretch(resized, 0.9)).all()
    once = P.prepare_image(image, 32, center_crop=True, crop_first=True)
    side = 0.9**0.5
    box = [(1 - side) / 2 * 80, (1 - side) / 2 * 64, (1 + side) / 2 * 80, (1 + side) / 2 * 64]
    direct = Image.fromarray(image).resize((32, 32), Image.Resampling.LANCZOS, box=tuple(box))
    assert (once == np.asarray(direct)).all() and (once != cropped).any()
    exact_size = picture(2, 32, 32)
    assert P.prepare_image(exact_size, 32, center_crop=False) is exact_size


def test_colours_are_normalised_for_each_tower_of_each_camera() -> None:
    images = torch.from_numpy(np.stack([picture(0, 32, 32), picture(1, 32, 32)]))[None]
    pixels = P.normalise_pixels(images, CONFIG)
    assert pixels.shape == (1, 12, 32, 32)
    x = images[0].double() / 255
    for camera in range(2):
        for tower, config in enumerate(CONFIG.towers):
            for channel in range(3):
                expected = (x[camera, :, :, channel] - config.mean[channel]) / config.std[channel]
                seen = pixels[0, 6 * camera + 3 * tower + channel].double()
                near(seen, expected)


def test_arrays_pictures_and_lists_of_them_are_the_same() -> None:
    image = picture(0)
    for given in (image, Image.fromarray(image), [image], (Image.fromarray(image),), image[None]):
        (checked,) = P.check_images(given, 1)
        assert (checked == image).all()
    grey = Image.fromarray(image).convert("L")
    assert P.check_images(grey, 1)[0].shape == (48, 48, 3)


@pytest.mark.parametrize(
    ("images", "error", "said"),
    [
        ("image.png", TypeError, "got str"),
        ([picture(0), picture(1)], ValueError, r"sees 1 camera\(s\), got 2"),
        ([], ValueError, "got 0 image"),
        ([None], TypeError, "camera 0 must be a numpy array or a PIL image, got NoneType"),
        (picture(0) / 255.0, TypeError, r"dtype float64; expected uint8 .*multiply by 255"),
        (picture(0)[..., :1], ValueError, r"\(48, 48, 1\); expected \[height, width, 3\]"),
        ([picture(0)[..., 0]], ValueError, r"\(48, 48\); expected"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"\(0, 4, 3\)"),
    ],
)
def test_bad_images_are_named(images: object, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        P.check_images(images, 1)


# ---------------------------------------------------------------------- prompt
def test_the_prompt_is_lower_case_and_ends_with_the_empty_token() -> None:
    words = tokenizer()
    ids, mask = P.tokenize(["Pick up the CAN"], words, CONFIG)
    assert mask is None
    text = " ".join(words.convert_ids_to_tokens(ids[0].tolist()))
    assert text == (
        "<s> <unk> : <unk> action should the robot take to pick up the can ? <unk> : <empty>"
    )
    assert P.PROMPT.format(instruction="x") == ("In: What action should the robot take to x?\nOut:")


def test_prompts_of_a_batch_are_padded_on_the_left() -> None:
    ids, mask = P.tokenize(["lift the can now", "lift milk"], tokenizer(), CONFIG)
    assert mask is not None
    assert mask.sum(1).tolist() == [ids.shape[1], ids.shape[1] - 2]
    assert ids[1, :3].tolist() == [3, 3, 1] and mask[1, :3].tolist() == [0, 0, 1]
    assert ids[:, -1].tolist() == [4, 4]


# ---------------------------------------------------------------------- numbers
def test_bounds_scale_to_unit_and_back_outside_the_mask_nothing() -> None:
    limits = P.bounds(CONFIG, "pick_place", "action")
    stats = CONFIG.norm_stats["pick_place"]["action"]
    robot = limits.unnormalise(np.array([-1.0] * 6 + [0.25]))
    np.testing.assert_allclose(robot, [*stats["q01"][:6], 0.25])
    np.testing.assert_allclose(limits.unnormalise(np.ones(7))[:6], stats["q99"][:6])
    values = np.linspace(-0.9, 0.9, 7)
    np.testing.assert_allclose(limits.normalise(limits.unnormalise(values)), values)
    assert np.abs(limits.normalise(np.full(7, 100.0))).max() == 1


def test_oft_may_use_the_extremes() -> None:
    config = OpenVLAOFTConfig(**sizes(), bounds="min-max")
    stats = config.norm_stats["pick_place"]["proprio"]
    assert P.bounds(config, "pick_place", "proprio").low.tolist() == stats["min"]


def test_a_libero_suite_finds_its_statistics() -> None:
    assert P.resolve_key(CONFIG.norm_stats, "libero_spatial") == "libero_spatial_no_noops"
    assert P.resolve_key({"one": {}}, None) == "one"
    with pytest.raises(ValueError, match="knows: libero_spatial_no_noops, pick_place"):
        P.resolve_key(CONFIG.norm_stats, "bridge_orig")
    with pytest.raises(ValueError, match="choose the statistics"):
        P.resolve_key(CONFIG.norm_stats, None)
    with pytest.raises(ValueError, match="carries no statistics"):
        P.resolve_key({}, None)


def test_statistics_that_do_not_fit_are_named() -> None:
    stats = {"q01": [0.0] * 6, "q99": [1.0] * 6}
    config = OpenVLAConfig(**(sizes() | {"norm_stats": {"arm": {"action": stats}}}))
    with pytest.raises(ValueError, match=r"\(6,\).*this policy has 7 dimensions"):
        P.bounds(config, "arm", "action")
    with pytest.raises(ValueError, match="no q01/q99 for 'proprio'"):
        P.bounds(config, "arm", "proprio")


# ---------------------------------------------------------------------- predict_action
def test_openvla_returns_one_action_in_robot_units() -> None:
    model = make_openvla()
    action = model.predict_action(picture(0), "pick up the can", unnorm_key="pick_place")
    assert action.shape == (7,) and action.dtype == np.float32
    inputs = model.prepare([observation(0)])
    expected = P.bounds(model.config, "pick_place", "action").unnormalise(model.infer(inputs)[0])
    np.testing.assert_allclose(action, expected, rtol=1e-6)
    other = model.predict_action(picture(0), "pick up the can", unnorm_key="libero_spatial")
    assert (other[:6] != action[:6]).all() and other[6] == action[6]


def test_oft_returns_a_chunk() -> None:
    model = make_oft()
    seen = observation(0, cameras=2)
    chunk = model.predict_action(
        seen["images"], seen["instruction"], seen["proprio"], unnorm_key="pick_place"
    )
    assert chunk.shape == (4, 7) and chunk.dtype == np.float32
    assert np.isfinite(chunk).all() and np.ptp(chunk, axis=0).min() > 0


def test_a_batch_is_its_observations_one_by_one() -> None:
    sentences = ["Pick up the can", "lift the milk slowly now", "take robot"]
    for model, cameras in ((make_openvla(), 1), (make_oft(), 2)):
        seen = [observation(i, cameras, text) for i, text in enumerate(sentences)]
        seen[1]["unnorm_key"] = "libero_spatial"
        together = model.predict_actions(seen)
        alone = np.concatenate([model.predict_actions([one]) for one in seen])
        near(together, alone, rel=5e-5)  # other kernels for a single row
        assert np.abs(together[0] - together[1]).max() > 0


def test_the_crop_can_be_switched_off() -> None:
    model = make_oft()
    seen = [observation(0, cameras=2)]
    default, on, off = (model.predict_actions(seen, center_crop=c) for c in (None, True, False))
    assert (default == on).all() and (off != on).any()


def test_inputs_are_in_the_models_dtype() -> None:
    model = make_oft().to(torch.bfloat16)
    inputs = model.prepare([observation(0, cameras=2)])
    assert inputs.pixel_values.dtype == torch.bfloat16 and inputs.proprio is not None
    assert inputs.proprio.dtype == torch.bfloat16
    assert model.predict_actions([observation(0, cameras=2)]).dtype == np.float32


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"instruction": 3}, TypeError, "instruction must be a string"),
        ({"instruction": "  "}, ValueError, "instruction is empty"),
        ({"proprio": None}, ValueError, "give `proprio` with 8 numbers"),
        ({"proprio": np.zeros(7)}, ValueError, r"shape \(7,\); expected \(8,\)"),
        ({"proprio": [np.nan] * 8}, ValueError, "not finite"),
        ({"images": [picture(0)]}, ValueError, r"sees 2 camera\(s\), got 1"),
        ({"unnorm_key": "bridge"}, ValueError, "unknown unnorm_key 'bridge'"),
        ({"image": picture(0)}, ValueError, r"unknown entries \['image'\]"),
    ],
)
def test_bad_observations_are_named(change: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        make_oft().predict_actions([observation(0, cameras=2) | change])


def test_other_mistakes_are_named() -> None:
    model = make_openvla()
    with pytest.raises(ValueError, match="reads no robot state"):
        model.predict_action(picture(0), "lift", np.zeros(8), unnorm_key="pick_place")
    with pytest.raises(ValueError, match="no observation given"):
        model.predict_actions([])
    with pytest.raises(TypeError, match="an observation is a dict"):
        model.predict_actions([picture(0)])  # type: ignore[list-item]
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        model.predict_action(picture(0), "lift", unnorm_key="pick_place")


@pytest.mark.parametrize("make", [make_openvla, make_oft])
def test_a_prompt_that_the_decoder_has_no_positions_for_is_refused(make: Any) -> None:
    model = make()
    seen = observation(1, model.config.num_images, "milk " * 20_000)
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens.*at most \d+.*shorter"):
        model.predict_actions([seen])
