"""One episode: how the policy is driven, what is timed, counted and recorded."""

import base64
import io
import json
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from torch import nn

import vla_pruner as vp
from toy_task import CAMERAS, STEP_LIMIT, VISUAL, ToyScene, rollout, tiny_policy
from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.control import Control
from vla_pruner.episodes.episode import Episode
from vla_pruner.pruning.flops import prefill_flops, pruned_prefill_flops

SIZES = {"layers": 4, "hidden": 32, "ffn": 64}
CONTROL = Control(CAMERAS, execute=2, reads_state=True)
SOLVED, UNSOLVED = 100, 102


@pytest.fixture
def policy() -> nn.Module:
    return tiny_policy()


@pytest.fixture
def session(policy: nn.Module) -> Iterator[vp.Session]:
    with vp.prune(policy, "vla-pruner", keep=0.25) as session:
        yield session


def run(policy: nn.Module, seed: int = SOLVED, scene: ToyScene | None = None, **options) -> Episode:
    settings = {"control": CONTROL, "step_limit": STEP_LIMIT, **options}
    return rollout(policy, scene or ToyScene(), seed, 1, **settings)


def test_an_episode_ends_with_success_or_at_the_limit(policy):
    solved, unsolved = run(policy), run(policy, UNSOLVED)
    assert (solved.success, solved.steps) == (True, 7)
    assert (unsolved.success, unsolved.steps) == (False, STEP_LIMIT)
    assert solved.instruction == "pick up the plate"


def test_the_first_actions_of_each_chunk_are_carried_out_in_order(policy):
    scene, chunks = ToyScene(), []
    original = policy.predict_action

    def remember(*args, **kwargs):
        chunks.append(original(*args, **kwargs))
        return chunks[-1]

    with vp.prune(policy, "none") as session:
        policy.predict_action = remember
        episode = run(policy, UNSOLVED, scene, session=session)
    assert [call.step for call in episode.calls] == [0, 2, 4, 6, 8, 10]
    expected = np.concatenate([chunk[:2] for chunk in chunks])
    assert np.array_equal(np.stack(scene.actions), expected)


def test_calls_are_counted_by_the_formula_and_warm_up_is_marked(policy, session):
    calls = run(policy, UNSOLVED, session=session).calls
    assert [call.warm_up for call in calls] == [True] * 3 + [False] * 3
    assert {call.visual for call in calls} == {VISUAL}
    assert [call.visual_kept for call in calls] == [VISUAL] * 3 + [VISUAL // 4] * 3
    tokens = calls[0].tokens
    full = prefill_flops(tokens, **SIZES)
    pruned = pruned_prefill_flops(tokens, VISUAL, 8, cut_layer=3, **SIZES)
    assert [call.prefill_macs for call in calls] == [full] * 3 + [pruned] * 3
    assert {call.full_macs for call in calls} == {full}
    assert all(call.latency_ms > 0 for call in calls)


def test_a_gated_method_learns_how_far_the_hand_moved(policy):
    """A call carries two steps out, of 0.01 m along each axis."""
    with vp.prune(policy, "vla-adp", keep=0.5) as session:
        told, motion = [], session.motion
        session.motion = lambda value, episode: (told.append(value), motion(value, episode))
        episode = run(policy, UNSOLVED, session=session)
    assert told == pytest.approx([0.02 * 3**0.5] * len(told), rel=1e-5)
    assert len(told) == len(episode.calls)
    assert [call.warm_up for call in episode.calls][:3] == [True] * 3  # Three values decide.


def test_the_baseline_is_timed_without_any_hook(policy):
    hooks = []
    original, decoder = policy.predict_action, policy.language_model.model

    def watched(*args, **kwargs):
        hooks.append(len(decoder._forward_pre_hooks) + len(decoder._forward_hooks))
        return original(*args, **kwargs)

    policy.predict_action = watched
    episode = run(policy)
    counted, *timed = hooks
    assert counted > 0
    assert timed == [0] * len(episode.calls)
    assert not any(call.warm_up for call in episode.calls)
    assert {call.visual_kept for call in episode.calls} == {VISUAL}


def test_the_baseline_counts_the_tokens_that_a_session_counts(policy):
    bare = run(policy).calls
    with vp.prune(policy, "vla-pruner", keep=0.5) as session:
        pruned = run(policy, session=session).calls
    assert {call.tokens for call in bare} == {call.tokens for call in pruned}
    assert {call.full_macs for call in bare} == {call.full_macs for call in pruned}


def test_an_episode_forgets_the_one_before(policy, session):
    scene = ToyScene()
    first = run(policy, UNSOLVED, scene, session=session)
    path = np.stack(scene.actions)
    run(policy, SOLVED, scene, session=session)
    again = run(policy, UNSOLVED, scene, session=session)
    assert np.array_equal(np.stack(scene.actions), path)
    assert [call.warm_up for call in again.calls] == [call.warm_up for call in first.calls]


def test_keeping_every_token_moves_the_arm_as_the_untouched_model_does(policy):
    scene = ToyScene()
    run(policy, UNSOLVED, scene)
    path = np.stack(scene.actions)
    with vp.prune(policy, "vla-pruner", keep=1.0) as session:
        run(policy, UNSOLVED, scene, session=session)
    assert np.array_equal(np.stack(scene.actions), path)


def test_an_episode_survives_json(policy, session):
    episode = run(policy, session=session, condition="vla-pruner@0.25")
    assert Episode.from_dict(json.loads(json.dumps(episode.as_dict()))) == episode


# -- driving --------------------------------------------------------------------------------------


def test_control_is_what_the_policy_folder_says(policy, tmp_path):
    said = {"control": {"cameras": ["hand", "front"], "execute": 3}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    control = Control.of(policy, CAMERAS, folder=tmp_path)
    assert control == Control(("hand", "front"), 3, reads_state=True)
    assert Control.of(policy, CAMERAS, folder=tmp_path, execute=1).execute == 1
    for execute, said in (
        (0, "at least one camera and one action"),
        (99, "execute=99: a chunk of"),
    ):
        with pytest.raises(ValueError, match=said):
            Control.of(policy, CAMERAS, execute=execute)


def test_control_falls_back_to_the_policy_s_sizes(policy):
    assert Control.of(policy, CAMERAS) == Control(CAMERAS, 2, reads_state=True)
    assert Control.of(nn.Identity(), CAMERAS) == Control(("front",), 1, reads_state=False)


def test_a_camera_that_the_scene_lacks_is_named(policy, tmp_path):
    (tmp_path / "config.json").write_text('{"control": {"cameras": ["top"]}}')
    with pytest.raises(ValueError, match="top; the scene has front, hand"):
        Control.of(policy, CAMERAS, folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "method", "keep", "label"),
    [
        ("none", "none", None, "all tokens"),
        ("vla-pruner@0.125", "vla-pruner", 0.125, "vla-pruner, 12.5 %"),
        ("fastv@64", "fastv", 64, "fastv, 64 tokens"),
        (
            "vla-pruner@0.25:window=1:first=nearest",
            "vla-pruner",
            0.25,
            "vla-pruner, 25 %, window 1, first nearest",
        ),
    ],
)
def test_conditions_are_written_as_they_are_read(text, method, keep, label):
    condition = Condition.parse(text)
    assert (condition.method, condition.keep) == (method, keep)
    assert (condition.name, condition.label) == (text, label)


@pytest.mark.parametrize("text", ["vla-pruner", "none@0.5", "vla-pruner@half", "vla-pruner@1.5"])
def test_conditions_that_make_no_sense_are_refused(text):
    with pytest.raises(ValueError, match=r"0\.25|\(0, 1\]"):
        Condition.parse(text)


def test_options_reach_the_method():
    condition = Condition.parse("random@4:seed=7:budget=view")
    policy = tiny_policy()
    with condition.attach(policy) as session:
        assert (session.method.seed, session.method.budget) == (7, "view")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fastv@0.5:window=1", "no option 'window'"),
        ("vla-pruner@0.5:window", "name=value"),
        ("vla-pruner@0.5:window=two", "window"),
        ("none@:window=1", "after '@' comes a fraction"),
        ("none:window=1", "no option 'window'|write 'none'"),
    ],
)
def test_options_that_make_no_sense_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Condition.parse(text)


def test_a_misspelt_method_is_recognised():
    with pytest.raises(ValueError, match="did you mean 'vla-pruner'"):
        Condition.parse("vla-prunner@0.5")


# -- recording ------------------------------------------------------------------------------------


def sheet_of(recording: dict, camera: int) -> Image.Image:
    data = recording["sheets"][camera].removeprefix("data:image/webp;base64,")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_recording_has_a_frame_for_every_step_and_one_for_the_end(policy, session):
    recording = run(policy, UNSOLVED, session=session, record=True).recording
    size = recording["size"]
    assert (recording["frames"], recording["columns"]) == (STEP_LIMIT + 1, 10)
    assert sheet_of(recording, 0).size == (10 * size, 2 * size)
    assert recording["cameras"] == list(CAMERAS)
    assert recording["grids"] == [4, 4]


def test_frames_show_what_the_policy_sees(policy):
    """The middle 90 % of the area, for a policy that crops."""
    recording = run(policy, record=True).recording
    scene = ToyScene()
    scene.reset(SOLVED, 1)
    image = scene.observe(CAMERAS)["hand"]
    assert recording["size"] == round(40 * 0.9**0.5) == 38
    frame = np.asarray(sheet_of(recording, 1))[:38, :38].astype(float)
    assert np.abs(frame - image[1:39, 1:39]).mean() < np.abs(frame - image[:38, :38]).mean()


def test_a_recording_says_what_was_kept_and_why(policy, session):
    calls = run(policy, UNSOLVED, session=session, record=True).recording["calls"]
    assert [call["step"] for call in calls] == [0, 2, 4, 6, 8, 10]
    assert all(call["kept"] == "4" * VISUAL and call["warm_up"] for call in calls[:3])
    for call in calls[3:]:
        assert VISUAL - call["kept"].count("0") == VISUAL // 4
        assert set(call["kept"]) <= set("0123")
    report = session.last
    kept = [i for i, why in enumerate(calls[-1]["kept"]) if why != "0"]
    assert kept == report.kept_indices[0].tolist()
    forecast = np.frombuffer(base64.b64decode(calls[-1]["forecast"]), np.uint8)
    assert len(forecast) == VISUAL
    assert forecast.argmax() == int(report.forecast[0].argmax())
    assert forecast.max() == 255


def test_without_a_session_nothing_is_scored_and_everything_kept(policy):
    for call in run(policy, record=True).recording["calls"]:
        assert call["semantic"] is call["forecast"] is None
        assert call["kept"] == "4" * VISUAL


def test_visual_tokens_that_are_no_square_cannot_be_drawn():
    from vla_pruner.episodes.picture import _grid

    assert _grid(100) == 10
    with pytest.raises(ValueError, match="15 visual tokens"):
        _grid(15)
