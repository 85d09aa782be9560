"""LIBERO's training samples, its words, and the training stage that uses them."""

import numpy as np
import pytest
import torch

from checks import near
from vla_pruner.models import load
from vla_pruner.reference import policies
from vla_pruner.reference.__main__ import WEIGHTS
from vla_pruner.reference.dataset import CHUNK
from vla_pruner.reference.demonstrations import FORMAT_VERSION, pack_images, write_episode
from vla_pruner.reference.libero.dataset import LiberoDemonstrations
from vla_pruner.reference.libero.suites import INSTRUCTIONS, SUITES, TASKS
from vla_pruner.reference.training import Settings, Trainer, export
from vla_pruner.scenes.pick_place_task import CAMERAS, IMAGE_SIZE

FRAMES, STRIDE, STEPS = 5, 4, 18


def make_episode(perturbed_at=(), seed=0):
    """An episode of random frames; action t is t / 100 in every dimension but the gripper's."""
    rng = np.random.default_rng(seed)
    action = np.repeat(np.arange(STEPS)[:, None] / 100, 7, axis=1).astype(np.float32)
    action[:, 6] = np.where(np.arange(STEPS) < 8, -1, 1)
    episode = {
        "proprio": rng.normal(size=(FRAMES, 8)).astype(np.float32),
        "focus": rng.normal(size=(FRAMES, 3)).astype(np.float32),
        "reaching": action[::STRIDE, 6] < 0,
        "action": action,
        "executed": action,
        "perturbed": np.isin(np.arange(STEPS), perturbed_at),
        "stride": np.array(STRIDE),
        "instruction": np.array(INSTRUCTIONS["libero_object"][seed]),
        "suite": np.array("libero_object"),
        "task": np.array(seed),
        "seed": np.array(seed),
        "format": np.array(FORMAT_VERSION),
    }
    for camera in CAMERAS:
        shape = (FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3)
        episode |= pack_images(camera, list(rng.integers(0, 255, shape, dtype=np.uint8)))
        points = np.full((FRAMES, 2, 2), IMAGE_SIZE / 2, dtype=np.float32)
        points[:, 1] = np.nan if camera == "wrist" else IMAGE_SIZE / 4
        episode[f"{camera}_points"] = points
    return episode


def read(folder, **options):
    write_episode(folder / "episode_libero_object_0_000000.npz", make_episode(**options))
    data = LiberoDemonstrations(folder, pixels=140)
    assert data.refresh() == 1
    return data


def test_a_chunk_holds_the_steps_after_its_frame(tmp_path):
    data = read(tmp_path)
    assert len(data) == FRAMES
    batch = data.sample(np.random.default_rng(0), 64, reaching=0.0)
    starts = np.round(batch.actions[:, 0, 0] * 100).astype(int)
    assert set(starts) == {0, 4, 8, 12, 16}
    expected = np.minimum(starts[:, None] + np.arange(CHUNK), STEPS - 1)
    np.testing.assert_array_equal(np.round(batch.actions[..., 0] * 100), expected)
    assert batch.images.shape == (64, 2, 140, 140, 3)
    assert batch.action_valid.all()


def test_reaching_samples_have_open_fingers(tmp_path):
    batch = read(tmp_path).sample(np.random.default_rng(0), 32, reaching=1.0)
    assert (batch.actions[:, 0, 6] < 0).all()


def test_an_action_after_a_push_is_not_taught(tmp_path):
    batch = read(tmp_path, perturbed_at=[6]).sample(np.random.default_rng(0), 64, reaching=0.0)
    for actions, valid in zip(batch.actions, batch.action_valid, strict=True):
        start = round(float(actions[0, 0]) * 100)
        assert valid.tolist() == [start > 6 or start + i <= 6 for i in range(CHUNK)]


def test_points_are_those_of_the_focus_and_of_the_gripper(tmp_path):
    batch = read(tmp_path).sample(np.random.default_rng(0), 16, shift=0.0)
    assert np.abs(batch.named - 0.5).max() < 0.01
    assert (batch.points[:, :, :4] == -1).all()
    assert np.abs(batch.points[:, 0, 4] - (40 * 0.925 * 140 / 131.4) / 140).max() < 0.05
    assert (batch.points[:, 1, 4] == -1).all()


def test_the_tokenizer_knows_every_word_of_libero():
    tokenizer = policies.tokenizer("mini-oft-libero")
    for suite in SUITES:
        assert len(INSTRUCTIONS[suite]) == TASKS
        for text in INSTRUCTIONS[suite]:
            tokens = tokenizer.tokenize(text)
            assert tokenizer.unk_token not in tokens
            # Few words are cut: a policy should not have to spell.
            assert len(tokens) <= len(text.split()) + 3
    assert len(tokenizer) <= policies.VOCABULARY - 64


def test_the_tokenizer_of_the_other_policies_is_the_shipped_one():
    shipped = load(str(WEIGHTS / "mini-oft")).tokenizer.get_vocab()
    assert policies.tokenizer().get_vocab() == shipped


@pytest.mark.slow
def test_training_starts_from_mini_oft_and_ends_in_a_policy(tmp_path):
    data = read(tmp_path)
    settings = Settings("mini-oft-libero", steps=2, batch=2)
    with torch.enable_grad():
        trainer = Trainer(settings, data, tmp_path / "run", WEIGHTS / "mini-oft")
        source = load(str(WEIGHTS / "mini-oft"))
        words = [source.tokenizer.get_vocab()["▁pick"], trainer.tokenizer.get_vocab()["▁pick"]]
        tables = [m.language_model.get_input_embeddings().weight for m in (source, trainer.model)]
        torch.testing.assert_close(tables[0][words[0]].float(), tables[1][words[1]].float())
        trainer.run()
    export(tmp_path / "run" / "mini-oft-libero.pt", tmp_path / "policy")
    policy = load(str(tmp_path / "policy"))
    assert list(policy.config.norm_stats) == ["libero"]
    low, high = (np.array(policy.config.norm_stats["libero"]["proprio"][q]) for q in ("q01", "q99"))
    np.testing.assert_allclose((low, high), data.proprio_quantiles(), rtol=1e-5)
    image = np.zeros((256, 256, 3), dtype=np.uint8)
    chunk = policy.predict_action([image, image], "pick up the milk", proprio=np.zeros(8))
    assert chunk.shape == (CHUNK, 7)
    # Started again from its own export, it keeps words and normalisation.
    again = Trainer(settings, data, tmp_path / "again", tmp_path / "policy")
    weight = again.model.language_model.get_input_embeddings().weight
    torch.testing.assert_close(
        weight.detach(), policy.language_model.get_input_embeddings().weight.float()
    )
    np.testing.assert_allclose(again.proprio_bounds, (low, high))


def test_going_on_with_other_data_converts_the_normalisation(tmp_path):
    data = read(tmp_path)
    settings = Settings("mini-oft-libero", steps=1, batch=2)
    with torch.enable_grad():
        Trainer(settings, data, tmp_path, WEIGHTS / "mini-oft").run()
    (tmp_path / "more").mkdir()
    wider = make_episode(seed=1)
    wider["action"] = 3 * wider["action"] + 0.1
    wider["proprio"] = 2 * wider["proprio"] - 1
    write_episode(tmp_path / "more" / "episode_libero_object_1_000000.npz", wider)
    more = LiberoDemonstrations(tmp_path / "more", pixels=140)
    more.refresh()
    checkpoint = tmp_path / "mini-oft-libero.pt"
    same = Trainer(settings, data, tmp_path / "same", checkpoint)
    other = Trainer(settings, more, tmp_path / "other", checkpoint)
    assert np.abs(other.action_bounds[1] - same.action_bounds[1]).max() > 0.05
    state = data.sample(np.random.default_rng(0), 4).proprio

    def said(trainer):
        """Actions in their own units, without clipping the state."""
        low, high = trainer.proprio_bounds
        scaled = torch.from_numpy(2 * (state - low) / (high - low) - 1).float()
        ids, mask = trainer.prompts(["pick up the milk"] * 4)
        pixels = torch.zeros(4, 12, 140, 140)
        trainer.model.eval()
        actions = trainer.model.action_head(trainer.model.action_hidden(ids, pixels, scaled, mask))
        low, high = trainer.action_bounds
        return (actions.detach().numpy() + 1) / 2 * (high - low) + low

    near(said(other), said(same), rel=0.0001)


def test_the_stage_needs_something_to_start_from(tmp_path):
    with pytest.raises(ValueError, match="--start"):
        Trainer(Settings("mini-oft-libero"), read(tmp_path), tmp_path / "run")
