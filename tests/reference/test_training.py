"""Training data, the three stages, resuming, and the policy folder that comes out."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vla_pruner as vp
from checks import near
from vla_pruner.models import load
from vla_pruner.models.loading import shipped
from vla_pruner.models.openvla.processing import PROMPT
from vla_pruner.models.pi0.gemma import SharedKV
from vla_pruner.reference import policies
from vla_pruner.reference.__main__ import main
from vla_pruner.reference.dataset import CHUNK, Demonstrations
from vla_pruner.reference.demonstrations import FORMAT_VERSION, _to_jpeg
from vla_pruner.reference.flow import FlowTrainer
from vla_pruner.reference.training import STAGES, Settings, Trainer, export, plain_attention
from vla_pruner.scenes.pick_place_task import CAMERAS, IMAGE_SIZE, OBJECT_NAMES

STEPS = 12


def write_episode(folder, seed, perturbed_at=()):
    """An episode of random frames in the recorder's format; the point of object 0 is painted."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 255, (STEPS, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    arrays = {
        "proprio": rng.normal(size=(STEPS, 8)).astype(np.float32),
        "answers": rng.uniform(-1, 1, (STEPS, len(OBJECT_NAMES), 7)).astype(np.float32),
        "answerable": np.ones((STEPS, len(OBJECT_NAMES)), dtype=bool),
        "perturbed": np.isin(np.arange(STEPS), perturbed_at),
        "object_positions": rng.normal(size=(STEPS, len(OBJECT_NAMES), 3)).astype(np.float32),
        "target": np.array(seed % 4),
        "seed": np.array(seed),
        "format": np.array(FORMAT_VERSION),
    }
    arrays["action"] = arrays["answers"][:, seed % 4]
    for camera in CAMERAS:
        jpegs = [_to_jpeg(frame) for frame in frames]
        arrays[f"{camera}_jpeg"] = np.frombuffer(b"".join(jpegs), dtype=np.uint8)
        arrays[f"{camera}_offsets"] = np.cumsum([0, *map(len, jpegs)])
        arrays[f"{camera}_points"] = np.full((STEPS, 5, 2), IMAGE_SIZE / 2, dtype=np.float32)
    np.savez(folder / f"episode_{seed:06d}.npz", **arrays)
    return arrays


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demonstrations")
    for seed in range(4):
        write_episode(folder, seed)
    return folder


@pytest.fixture(scope="module")
def data(folder):
    data = Demonstrations(folder, pixels=140)
    assert data.refresh() == 4
    return data


@pytest.fixture(autouse=True)
def gradients():
    with torch.enable_grad():
        yield


def test_a_batch_has_the_documented_shapes(data):
    batch = data.sample(np.random.default_rng(0), 6)
    assert batch.images.shape == (6, 2, 140, 140, 3) and batch.images.dtype == np.uint8
    assert batch.actions.shape == (6, CHUNK, 7)
    assert batch.points.shape == (6, 2, 5, 2)
    assert len(batch.instructions) == 6


def test_points_follow_the_crop(data):
    batch = data.sample(np.random.default_rng(0), 32, shift=4.0)
    assert np.abs(batch.points - 0.5).max() <= 5 / 140
    assert np.ptp(batch.points) > 0


def test_an_action_after_a_disturbance_is_not_taught(tmp_path):
    write_episode(tmp_path, 0, perturbed_at=[3])
    data = Demonstrations(tmp_path, pixels=140)
    data.refresh()
    recorded = write_episode(tmp_path, 0, perturbed_at=[3])["action"]
    batch = data.sample(np.random.default_rng(0), 64, other_target=0.0)
    for actions, valid in zip(batch.actions, batch.action_valid, strict=True):
        start = int(np.argmin(np.abs(recorded - actions[0]).sum(1)))
        # Actions start .. 3 follow an undisturbed arm; what comes after step 3 does not.
        expected = [start > 3 or start + i <= 3 for i in range(CHUNK)]
        assert valid.tolist() == expected


def test_another_instruction_brings_that_objects_answer(data, folder):
    batch = data.sample(np.random.default_rng(0), 64, other_target=1.0)
    names = {text.split(" in")[0].split("the ")[1].split(" and")[0] for text in batch.instructions}
    assert len(names) >= len(OBJECT_NAMES)
    single = batch.action_valid.sum(1) == 1
    assert single.any() and not single.all()


def test_an_empty_folder_says_how_to_record(tmp_path):
    with pytest.raises(FileNotFoundError, match="reference demos"):
        Demonstrations(tmp_path, pixels=140).refresh()


def test_new_episodes_are_picked_up(tmp_path):
    write_episode(tmp_path, 0)
    data = Demonstrations(tmp_path, pixels=140)
    assert data.refresh() == 1
    write_episode(tmp_path, 1)
    assert data.refresh() == 2 and len(data) == 2 * STEPS


def test_tokenizer_is_deterministic_and_leaves_room_for_actions():
    first, second = policies.tokenizer(), policies.tokenizer()
    text = PROMPT.format(instruction="pick up the milk and place it in its bin")
    ids = first(text)["input_ids"]
    assert ids == second(text)["input_ids"]
    assert ids[0] == 1 and first.unk_token_id not in ids
    assert max(ids) < policies.VOCABULARY - 64 - 256
    assert len(first) <= policies.VOCABULARY - 64 - 256


def test_policies_have_the_promised_shape():
    for name, views in (("mini-openvla", (100,)), ("mini-oft", (100, 100))):
        config = policies.config(name)
        assert config.views == views
        assert config.text["num_hidden_layers"] >= 8
    with pytest.raises(ValueError, match="mini-oft"):
        policies.config("mini-pi")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The three stages that build on each other, two steps each."""
    out = tmp_path_factory.mktemp("training")
    with torch.enable_grad():
        for stage in STAGES[:3]:
            Trainer(Settings(stage=stage, steps=2, batch=2), data, out).run()
    return out


@pytest.fixture(scope="module")
def flow(data, tmp_path_factory):
    """Folder of the flow stage after three steps."""
    out = tmp_path_factory.mktemp("flow")
    with torch.enable_grad():
        FlowTrainer(Settings(stage="mini-pi0", steps=3, batch=2), data, out).run()
    return out


def test_mini_pi0_starts_as_mini_oft_reads(data, tmp_path):
    """The same embeddings go through the same decoder, and the same pixels through the tower."""
    trainer, policy = FlowTrainer(Settings(stage="mini-pi0"), data, tmp_path), load("mini-oft")
    model = trainer.model.eval()
    embeds, shared = torch.randn(1, 6, 128), SharedKV()
    mask, positions = torch.zeros(1, 1, 6, 6), torch.arange(6)[None]
    found = model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=shared
    ).last_hidden_state
    expected = (
        policy.float()
        .language_model.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
        .last_hidden_state
    )
    near(found, expected, rel=0.0001)
    ids, width = torch.arange(20), 128
    words = policy.language_model.get_input_embeddings()(ids)
    torch.testing.assert_close(model.language_model.embed_tokens(ids) * width**0.5, words)
    image = torch.rand(1, 3, 140, 140) * 2 - 1
    features = model.vision_tower.post_layernorm(policy.vision_backbone.fused_featurizer(image))
    assert (model.vision_tower(image) - features).abs().mean() < 0.01  # another GELU


@pytest.mark.slow
def test_mini_pi0_trains_resumes_and_acts(flow, data, tmp_path):
    before = FlowTrainer(Settings(stage="mini-pi0", steps=3, batch=2), data, tmp_path)
    state = torch.load(flow / "mini-pi0.pt", weights_only=True)
    same = {n for n, p in before.model.named_parameters() if torch.equal(p, state["model"][n])}
    # Of the prefix's last layer nothing is read but keys and values.
    unread = [f"layers.7.{name}" for name in ("self_attn.q", "self_attn.o", "mlp", "post_att")]
    unread = [f"language_model.{name}" for name in (*unread, "norm")]
    assert state["step"] == 3
    assert not [n for n in same if not n.startswith(tuple(unread)) and "k_proj.bias" not in n]
    resumed = FlowTrainer(Settings(stage="mini-pi0", steps=4, batch=2), data, flow)
    with torch.enable_grad():
        resumed.run()
    assert resumed.step == 4
    assert main(["export", "mini-pi0", "--checkpoints", str(flow), "--out", str(tmp_path)]) == 0
    policy = load(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["control"]["execute"] == 2
    image = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    with vp.prune(policy, "vla-pruner", keep=0.25, window=1) as session:
        for _ in range(2):
            actions = policy.predict_action([image] * 2, "put the can in its bin", np.zeros(8))
        assert session.last.visual_kept == 50
    assert actions.shape == (CHUNK, 7) and np.isfinite(actions).all()
    again = FlowTrainer(Settings(stage="mini-pi0"), data, tmp_path / "next", start=tmp_path)
    expected = policy.state_dict()["action_out_proj.weight"].float()
    assert torch.equal(again.model.action_out_proj.weight, expected)
    checkpoint = flow / "mini-pi0.pt"
    longer = FlowTrainer(Settings(stage="mini-pi0"), data, tmp_path / "longer", start=checkpoint)
    average = dict(zip(state["model"], torch.load(checkpoint)["average"], strict=False))
    found = longer.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in average.items())


def test_unknown_actions_tell_the_flow_nothing(data, tmp_path):
    """Where an action is not valid, its value does not reach the loss."""
    trainer = FlowTrainer(Settings(stage="mini-pi0"), data, tmp_path)
    batch = data.sample(np.random.default_rng(0), 2)
    valid = batch.action_valid.copy()
    valid[:, 2:] = False
    losses = []
    for filler in (0.0, 0.9):
        actions = np.where(valid[..., None], batch.actions, np.float32(filler))
        torch.manual_seed(0)
        changed = replace(batch, actions=actions, action_valid=valid)
        losses.append(trainer.loss(changed)[1]["flow"])
    assert losses[0] == losses[1]


def test_a_stage_starts_from_the_averaged_weights_of_the_one_before(trained, data):
    trainer = Trainer(Settings(stage="mini-oft", steps=2, batch=2), data, trained)
    state = torch.load(trained / "mini-openvla.pt", weights_only=True)
    averaged = dict(zip(state["model"], state["average"], strict=False))
    weights = dict(trainer.model.named_parameters())
    for name in ("projector.fc1.weight", "language_model.model.layers.7.mlp.up_proj.weight"):
        assert torch.equal(weights[name], averaged[name])


def test_a_stage_needs_the_one_before(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="train that stage first"):
        Trainer(Settings(stage="mini-oft", steps=1), data, tmp_path)


def test_training_changes_every_part_that_acts(trained, data):
    before = Trainer(Settings(stage="mini-oft", steps=2, batch=2), data, trained)
    after = torch.load(trained / "mini-oft.pt", weights_only=True)["model"]
    same = [n for n, p in before.model.named_parameters() if torch.equal(p, after[n])]
    assert same == ["language_model.lm_head.weight"]  # parallel decoding writes no tokens


def test_an_interrupted_stage_continues_where_it_was(trained, data, tmp_path):
    for stage in STAGES[:2]:
        (tmp_path / f"{stage}.pt").write_bytes((trained / f"{stage}.pt").read_bytes())
    trainer = Trainer(Settings(stage="mini-openvla", steps=3, batch=2), data, tmp_path)
    trainer.restore(trainer.checkpoint)
    assert trainer.step == 2
    stored = torch.load(trained / "mini-openvla.pt", weights_only=True)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, stored["model"][name])
    trainer = Trainer(Settings(stage="mini-openvla", steps=3, batch=2), data, tmp_path)
    trainer.run()
    assert torch.load(tmp_path / "mini-openvla.pt", weights_only=True)["step"] == 3


@pytest.mark.parametrize("name", ["mini-openvla", "mini-oft"])
def test_the_exported_folder_acts(trained, tmp_path, name):
    export(trained / f"{name}.pt", tmp_path)
    policy = load(tmp_path)
    cameras = len(policy.config.views)
    images = [np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 90, dtype=np.uint8)] * cameras
    proprio = np.zeros(8) if name == "mini-oft" else None
    actions = policy.predict_action(images, "pick up the can", proprio=proprio)
    assert actions.shape == ((8, 7) if name == "mini-oft" else (7,))
    assert actions.dtype == np.float32 and np.isfinite(actions).all()
    control = json.loads((tmp_path / "config.json").read_text())["control"]
    assert control == policies.CONTROL[name] and control["suites"] == ["robosuite_pickplace"]


def test_shipped_policies_say_where_they_act() -> None:
    for name, folder in shipped().items():
        said = json.loads((folder / "config.json").read_text("utf-8"))["control"]
        # One may be older than the rule that its suites are named.
        assert {"suites": policies.CONTROL[name]["suites"], **said} == policies.CONTROL[name]


def test_the_loss_reads_actions_as_the_policy_writes_them(trained, data):
    """Bins of the loss and tokens of the policy mean the same action."""
    trainer = Trainer(Settings(stage="mini-openvla", steps=2, batch=2), data, trained)
    end = trainer.config.action_vocab_end
    actions = np.linspace(-1, 1, 41)
    tokens = trainer.model.encode_actions(actions)
    assert tokens.min() >= end - 256 and tokens.max() < end
    assert np.abs(trainer.model.decode_actions(tokens) - actions).max() <= 1 / 255


def test_ctrl_c_loses_nothing(data, tmp_path, monkeypatch):
    trainer = Trainer(Settings(stage="vision", steps=5, batch=2), data, tmp_path)
    update, calls = trainer._update, []

    def interrupted(progress):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(progress)
        return update(progress)

    monkeypatch.setattr(trainer, "_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert torch.load(tmp_path / "vision.pt", weights_only=True)["step"] == 2


def test_training_continues_from_an_exported_policy(trained, data, tmp_path):
    export(trained / "mini-oft.pt", tmp_path)
    policy = load(tmp_path)
    settings = Settings(stage="mini-oft", steps=2, batch=2)
    trainer = Trainer(settings, data, tmp_path / "next", start=tmp_path)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, policy.state_dict()[name].float(), rtol=0, atol=0)
    statistics = policy.config.norm_stats["pick_place"]
    np.testing.assert_array_equal(trainer.action_bounds[0], statistics["action"]["q01"])
    np.testing.assert_array_equal(trainer.proprio_bounds[1], statistics["proprio"]["q99"])


def test_a_checkpoint_of_the_same_stage_hands_on_its_normalisation(trained, folder, tmp_path):
    other = tmp_path / "demonstrations"
    other.mkdir()
    write_episode(other, 9)
    data = Demonstrations(other, pixels=140)
    data.refresh()
    path = trained / "mini-openvla.pt"
    saved = torch.load(path, weights_only=True)["bounds"]
    same = Trainer(Settings(stage="mini-openvla", steps=2), data, tmp_path, start=path)
    np.testing.assert_array_equal(same.action_bounds[0], saved[0].numpy())
    np.testing.assert_array_equal(same.proprio_bounds[1], saved[3].numpy())
    next_stage = Trainer(Settings(stage="mini-oft", steps=2), data, tmp_path, start=path)
    assert (next_stage.proprio_bounds[1] != saved[3].numpy()).any()


def test_a_policy_of_another_stage_is_refused_as_a_start(trained, data, tmp_path):
    export(trained / "mini-openvla.pt", tmp_path)
    settings = Settings(stage="mini-oft", steps=2, batch=2)
    with pytest.raises(ValueError, match="another size than stage `mini-oft`"):
        Trainer(settings, data, tmp_path / "next", start=tmp_path)


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "additive"])
def test_plain_attention_is_the_fused_one_with_its_gradients(kind):
    torch.manual_seed(0)
    query, key, value, weight = (torch.randn(2, 3, 7, 8) for _ in range(4))
    hidden = torch.rand(2, 1, 7, 7) < 0.4
    hidden[..., 0] = False
    mask = {"bool": ~hidden, "additive": torch.zeros(2, 1, 7, 7).masked_fill(hidden, -1e9)}.get(
        kind
    )
    results = []
    for device in ("cpu", "meta"):  # plain on the CPU; any other device keeps the fused kernel
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        with plain_attention(torch.device(device)):
            output = F.scaled_dot_product_attention(
                *inputs, attn_mask=mask, is_causal=kind == "causal"
            )
        (output * weight).sum().backward()
        results.append([output.detach(), *(x.grad for x in inputs)])
    for plain, fused in zip(*results, strict=True):
        near(plain, fused)


def test_plain_attention_ends_with_its_block():
    fused = F.scaled_dot_product_attention
    with pytest.raises(RuntimeError), plain_attention(torch.device("cpu")):
        assert F.scaled_dot_product_attention is not fused
        raise RuntimeError
    assert F.scaled_dot_product_attention is fused
