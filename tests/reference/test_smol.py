"""The stages of smol-oft on a tiny language model: pooled tokens, training, resuming, exporting."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_training import write_episode

import vla_pruner as vp
from vla_pruner.models import load
from vla_pruner.models.loading import shipped
from vla_pruner.models.openvla import base
from vla_pruner.reference import policies, smol
from vla_pruner.reference.dataset import Demonstrations
from vla_pruner.reference.smol import SmolSettings, SmolTrainer, export, pooled, positions
from vla_pruner.reference.training import normalised

LAYERS = smol.MIDDLE_LAYER
TEXT = {
    **base.SMOLLM2.text,
    "vocab_size": policies.VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "pad_token_id": 3,
}
OBSERVATION = [np.full((160, 160, 3), 90, dtype=np.uint8)] * 2, "pick up the can", np.zeros(8)


def weights(layers: int) -> dict[str, torch.Tensor]:
    """A random language model of these sizes, always the same."""
    random = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (policies.VOCABULARY, 48), "model.norm.weight": (48,)}
    for layer in range(layers):
        for name, shape in {
            "input_layernorm": (48,),
            "post_attention_layernorm": (48,),
            "self_attn.q_proj": (48, 48),
            "self_attn.k_proj": (16, 48),
            "self_attn.v_proj": (16, 48),
            "self_attn.o_proj": (48, 48),
            "mlp.gate_proj": (64, 48),
            "mlp.up_proj": (64, 48),
            "mlp.down_proj": (48, 64),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return {n: (0.1 * torch.randn(s, generator=random)).bfloat16() for n, s in shapes.items()}


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """A language model of 48 dimensions in the place of SmolLM2, and a cache of its own."""
    config = policies.smol_config

    def small(layers=LAYERS):
        return replace(
            config(layers),
            text={**TEXT, "num_hidden_layers": layers},
            empty_token_id=policies.tokenizer().convert_tokens_to_ids("▁"),
            pad_token_id=3,
        )

    monkeypatch.setattr(base, "read", lambda _, layers: weights(layers))
    monkeypatch.setattr(policies, "smol_config", small)
    monkeypatch.setattr(policies, "smol_tokenizer", lambda: policies.tokenizer("mini-oft"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demonstrations")
    for seed in range(2):
        write_episode(folder, seed)
    data = Demonstrations(folder, pixels=160)
    data.refresh()
    return data


def settings(**changes) -> SmolSettings:
    values = {"stage": "smol-oft", "steps": 2, "batch": 2, "layers": LAYERS, "pool": 4}
    return SmolSettings(**(values | changes))


@pytest.fixture
def seen(data, tmp_path):
    """The folder in which the first stage was trained."""
    SmolTrainer(settings(stage="smol-vision", steps=1), data, tmp_path).run()
    return tmp_path


def test_pooling_averages_blocks_of_each_camera():
    tokens = torch.arange(2 * 16, dtype=torch.float32).view(1, 32, 1)
    got = pooled(tokens, cameras=2, grid=4, pool=2).flatten()
    assert got.tolist() == [2.5, 4.5, 10.5, 12.5, 18.5, 20.5, 26.5, 28.5]
    assert pooled(tokens, 2, 4, 1) is tokens


def test_what_follows_the_image_stands_where_it_stands_with_all_tokens():
    every, coarse = positions(2, 4, 1, 40), positions(2, 4, 2, 16)
    assert every.tolist() == list(range(40))
    assert coarse[:9].tolist() == [0.0, 3.5, 5.5, 11.5, 13.5, 19.5, 21.5, 27.5, 29.5]
    assert coarse[9:].tolist() == every[33:40].tolist()


def test_unpooled_training_reads_what_the_policy_reads(seen, data):
    trainer = SmolTrainer(settings(pool=1), data, seen)
    batch = data.sample(np.random.default_rng(1), 3)
    ids, mask = trainer.prompts([*batch.instructions[:2], "pick up the can now please"])
    proprio = torch.from_numpy(normalised(batch.proprio, trainer.proprio_bounds))
    pixels = trainer.pixels(batch.images)
    with torch.no_grad():
        wanted = trainer.model.action_hidden(ids, pixels, proprio, mask)
        visual = trainer.model.visual_embeds(pixels)
        rows = trainer.hidden(visual, proprio, ids, mask)[:, trainer.config.action_rows]
    assert not mask.bool().all()
    torch.testing.assert_close(rows.reshape(wanted.shape), wanted)


def test_the_weight_of_a_pooled_token_is_that_of_its_block(seen, data, monkeypatch):
    """Where all visual tokens are equal and none has a position, pooling changes nothing."""
    fine = SmolTrainer(settings(pool=1), data, seen)
    coarse = SmolTrainer(settings(pool=4), data, seen)
    coarse.model = fine.model.float()
    monkeypatch.setattr(smol, "positions", lambda *_: torch.zeros(1000))
    ids, mask = fine.prompts(["pick up the can"])
    visual, state = torch.randn(1, 1, 48).expand(1, 512, 48), torch.zeros(1, 8)
    with torch.no_grad():
        rows = [t.hidden(visual, state, ids, mask)[:, -57:] for t in (fine, coarse)]
    # The bias is kept in the precision of the decoder.
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-3, atol=1e-3)


def test_only_low_rank_changes_of_the_language_model_learn(seen, data):
    trainer = SmolTrainer(settings(), data, seen)
    model = trainer.model.language_model
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = {n: p.detach().clone() for n, p in trainer._weights().items()}
    trainer.run()
    after = dict(model.named_parameters())
    assert frozen and all(torch.equal(after[name], value) for name, value in frozen.items())
    assert not any(name.endswith((".a", ".b")) for name in frozen)
    same = [name for name, value in trainer._weights().items() if torch.equal(value, before[name])]
    assert same == []


def test_towers_whose_rate_is_zero_stay_and_are_written(seen, data):
    trainer = SmolTrainer(settings(tower_rate=0), data, seen)
    before = {n: p.detach().clone() for n, p in trainer._weights().items()}
    trainer.run()
    moved = {n for n, p in trainer._weights().items() if not torch.equal(p, before[n])}
    seeing = {n for n in before if n.startswith(("vision_backbone", "projector"))}
    assert seeing and moved == set(before) - seeing


def test_patches_near_an_object_say_where_it_is():
    """Two objects, a patch on each and one beside the first; the rest is not asked."""
    grid, words = 16, torch.eye(4, 48)
    helpers = smol.SmolHelpers(48, 8)
    points = torch.full((1, 5, 2), -1.0)
    points[0, 0], points[0, 1] = torch.tensor([0.5, 0.5]) / grid, torch.tensor([8.5, 8.5]) / grid
    objects = torch.zeros(1, 4, 6)
    objects[0, :, 2] = 0.9
    objects[0, 1, 3] = 0.2
    visual = torch.zeros(1, grid * grid, 48)
    visual[0, [0, 1], 0] = 50.0
    visual[0, 8 * grid + 8, 1] = 50.0
    with torch.no_grad():
        helpers.place.weight.zero_()
        helpers.place.bias.zero_()
        helpers.place.weight[3, 1] = 1 / 50
        names, miss = helpers.place_loss(visual, words, points, objects, grid)
        # 0.09 of the image is 1.44 patches: a corner has 3 neighbours so near, a middle one 8.
        assert miss.item() == pytest.approx(8 / 6 / 13, rel=1e-5)
        visual[0, grid : grid + 2, 0] = 50.0
        for row in (-1, 0, 1):
            visual[0, (8 + row) * grid + torch.tensor([7, 8, 9]), 1] = 50.0
        right, none = helpers.place_loss(visual, words, points, objects, grid)
    assert none.item() == pytest.approx(0, abs=1e-6) and right < names


def test_an_interrupted_stage_continues(seen, data):
    SmolTrainer(settings(steps=1), data, seen).run()
    trainer = SmolTrainer(settings(steps=2, pool=2), data, seen)
    trainer.run()
    assert trainer.step == 2


def test_the_exported_folder_is_the_averaged_policy(seen, data):
    trainer = SmolTrainer(settings(), data, seen)
    trainer.run()
    export(seen / "smol-oft.pt", seen / "policy")
    assert not list((seen / "policy").glob("*.gguf"))
    policy = load(seen / "policy", dtype=torch.float32)
    average = dict(zip(trainer._weights(), trainer.average, strict=False))
    name = "model.layers.1.mlp.down_proj"
    change = trainer.model.get_submodule(f"language_model.{name}")
    a, b = (average[f"language_model.{name}.{part}"] for part in "ab")
    wanted = weights(LAYERS)[f"{name}.weight"].float() + change.scale * b @ a
    got = policy.language_model.get_submodule(name).weight
    torch.testing.assert_close(got, wanted, rtol=0.01, atol=0.01 * float(wanted.std()))
    with torch.no_grad(), vp.prune(policy, "vla-pruner", keep=0.25, window=1) as session:
        for kept in (512, 128):
            actions = policy.predict_action(*OBSERVATION)
            assert session.last.visual_kept == kept
    assert actions.shape == (8, 7) and np.isfinite(actions).all()


@pytest.mark.slow
def test_training_continues_from_an_exported_folder(seen, data):
    trainer = SmolTrainer(settings(), data, seen)
    trainer.run()
    export(seen / "smol-oft.pt", seen / "policy")
    again = SmolTrainer(settings(), data, seen / "again", start=seen / "policy")
    for (name, value), wanted in zip(again._weights().items(), trainer.average, strict=False):
        size = float(wanted.abs().max())
        torch.testing.assert_close(value, wanted, rtol=0.01, atol=1e-3 * size, msg=name)


def test_another_policy_is_refused_as_a_start(seen, data):
    with pytest.raises(ValueError, match="holds no policy that stage `smol-oft` trains"):
        SmolTrainer(settings(), data, seen, start=shipped()["mini-oft"])
