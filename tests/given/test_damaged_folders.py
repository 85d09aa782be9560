"""A policy folder that is damaged, or made to harm, is a CheckpointError with file and reason."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hf_vlm import llava
from test_openvla_checkpoint import edit_json
from test_pi0_checkpoint import openpi_folder, sizes
from tiny_openvla import make_oft, make_openvla
from tiny_openvla import observation as openvla_observation
from tiny_pi0 import CAMERAS, observation
from tiny_pi0 import make as make_pi0

import vla_pruner as vp
from vla_pruner.models import openvla, pi0
from vla_pruner.models.given.folder import CheckpointError, plain_name

KINDS = ("openvla", "oft", "pi0", "pi05", "openpi")
ONE_AT_ONCE = [pytest.param(k, marks=[] if k == "oft" else pytest.mark.slow) for k in KINDS]
"""Every kind of folder in `make test-all`, one of them in `make test`."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    """A whole folder of each kind."""
    root = tmp_path_factory.mktemp("whole")
    with torch.no_grad():
        openvla.save_pretrained(make_openvla(), root / "openvla")
        openvla.save_pretrained(make_oft(), root / "oft")
        for kind in ("pi0", "pi05"):
            pi0.save_pretrained(make_pi0(kind), root / kind)
        openpi_folder(root / "openpi", make_pi0(cameras=CAMERAS, max_state_dim=8))
    return {kind: root / kind for kind in KINDS}


@pytest.fixture
def folder(originals, tmp_path) -> Callable[[str], Path]:
    """A copy to be damaged, anew at each call."""

    def make(kind: str) -> Path:
        copy = tmp_path / "policy"
        shutil.rmtree(copy, ignore_errors=True)
        return Path(shutil.copytree(originals[kind], copy))

    return make


def load(folder: Path, kind: str) -> Any:
    if kind == "openpi":
        return pi0.from_pretrained(folder, flow_steps=3, **sizes("pi0"))
    return vp.models.load(folder)


def act(policy: Any) -> np.ndarray:
    if isinstance(policy, pi0.Pi0):
        return policy.predict_actions([observation(cameras=policy.config.num_images)])
    return policy.predict_actions([openvla_observation(0, policy.config.num_images)])


def refused(folder: Path, kind: str, file: str, *said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load(folder, kind)
    message = str(error.value)
    assert file in message and all(part in message for part in said), message
    assert len(message) < 2000


@pytest.mark.parametrize("kind", KINDS)
def test_whole_folders_load(folder, kind):
    assert np.isfinite(act(load(folder(kind), kind))).all()


# -- files that are cut off, or of another kind --------------------------------------------------


def json_files(kind: str) -> list[str]:
    files = {
        "openvla": ["config.json", "preprocessor_config.json", "dataset_statistics.json"],
        "pi0": ["config.json", "policy_preprocessor.json"],
        "openpi": ["config.json", "assets/robot/norm_stats.json"],
    }
    return [*files.get("openvla" if kind == "oft" else "pi0" if kind == "pi05" else kind, [])]


CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "utf-16": lambda content: content.decode().encode("utf-16"),
    "latin-1": lambda content: b'{"name": "\xe9\xff"}',
    "noise": lambda content: random.Random(0).randbytes(300),
    "zeros": lambda content: bytes(len(content)),
    "a list": lambda content: b"[]",
    "null": lambda content: b"null",
    "a number": lambda content: b"7",
    "deep": lambda content: b"[" * 200_000,
    "html": lambda content: b"<html>404</html>",
    "lfs": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("damage", CONTENTS)
@pytest.mark.parametrize("kind", ONE_AT_ONCE)
def test_a_file_that_is_not_what_it_should_be(folder, kind, damage):
    tensors = ["model.safetensors", "tokenizer.json"]
    tensors += ["action_head.safetensors", "proprio_projector.safetensors"] * (kind == "oft")
    for name in [*json_files(kind), *tensors]:
        copy = folder(kind)
        path = copy / name
        content = path.read_bytes()
        if damage == "utf-16" and name.endswith("safetensors"):
            continue
        path.write_bytes(CONTENTS[damage](content))
        refused(copy, kind, path.name)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_cut_off_anywhere(folder, kind):
    for share in (0.01, 0.5, 0.9, 0.9999):
        copy = folder(kind)
        path = copy / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        refused(copy, kind, "model.safetensors", "not a whole safetensors file")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_not_read(folder, kind):
    import os

    copy = folder(kind)
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").mkdir()
    refused(copy, kind, "model.safetensors", "no file")
    copy = folder(kind)
    (copy / "config.json").unlink()
    os.mkfifo(copy / "config.json")
    with pytest.raises(ValueError, match=r"config\.json"):
        load(copy, kind)


# -- entries of JSON files -----------------------------------------------------------------------

WRONG = [None, True, 0, -1, 7, 1e300, float("nan"), "x", [], [1], {}, {"a": 1}, 10**12]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every entry."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, below in inner:
        yield (*path, key)
        if isinstance(below, dict | list):
            yield from places(below, (*path, key))


def changed(values: Any, path: tuple[Any, ...], wrong: Any) -> Any:
    copy = json.loads(json.dumps(values))
    below = copy
    for key in path[:-1]:
        below = below[key]
    if wrong is ...:
        del below[path[-1]]
    else:
        below[path[-1]] = wrong
    return copy


@pytest.mark.parametrize("kind", ONE_AT_ONCE)
def test_any_entry_of_another_kind_is_refused_or_does_no_harm(folder, kind):
    """Only CheckpointError with the file's name; what loads acts on finite numbers or says so."""
    chosen, copy = random.Random(kind), folder(kind)
    count = {"refused": 0, "loaded": 0}
    for name in json_files(kind):
        values = json.loads((copy / name).read_text())
        cases = [(path, wrong) for path in places(values) for wrong in [*WRONG, ...]]
        for path, wrong in chosen.sample(cases, min(15, len(cases))):
            (copy / name).write_text(json.dumps(changed(values, path, wrong)))
            try:
                policy = load(copy, kind)
            except CheckpointError as error:
                assert str(copy) in str(error) and len(str(error)) < 3000, (path, wrong)
                count["refused"] += 1
                continue
            count["loaded"] += 1
            try:
                assert np.isfinite(act(policy)).all(), (path, wrong)
            except (ValueError, vp.models.NonFiniteActionError) as error:
                assert str(error)
        (copy / name).write_text(json.dumps(values))
    assert min(count.values()) > 2


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("openvla", {"text_config": {"vocab_size": "512"}}, "vocab_size='512'"),
        ("openvla", {"text_config": [1]}, "text_config must be an object"),
        ("openvla", {"text_config": {}}, "lack vocab_size"),
        ("openvla", {"text_config": {"vocab_size": 512, "hidden_size": 0}}, "hidden_size=0"),
        ("openvla", {"text_config": {"vocab_size": 512, "num_hidden_layers": 10**9}}, "at most"),
        ("openvla", {"text_config": {"vocab_size": 512, "model_type": "mixtral"}}, "a llama"),
        ("openvla", {"vla_pruner": [1]}, "vla_pruner must be an object"),
        ("openvla", {"vla_pruner": {"towers": [{"width": 8}]}}, "missing"),
        ("openvla", {"n_action_bins": "256"}, "n_action_bins='256'"),
        ("openvla", {"pad_to_multiple_of": 4096}, "pad_to_multiple_of=4096"),
        ("openvla", {"torch_dtype": "int8"}, "torch_dtype='int8'"),
        ("oft", {"norm_stats": []}, "norm_stats must be an object"),
        ("pi0", {"chunk_size": 0}, "chunk=0"),
        ("pi0", {"num_inference_steps": 2.5}, "flow_steps=2.5"),
        ("pi0", {"image_resolution": [42]}, "config.json"),
        ("pi0", {"input_features": [1]}, "input_features must be an object"),
        ("pi0", {"output_features": {"action": {"shape": ["5"]}}}, "action_dim='5'"),
        ("pi0", {"normalization_mapping": {"STATE": ["MEAN_STD"]}}, "scales STATE"),
        ("pi0", {"min_period": -1.0}, "min_period=-1.0"),
        ("pi0", {"empty_cameras": 10**9}, "empty_cameras"),
        ("pi0", {"vla_pruner": {"prefix": {"width": 32, "mlp": 8, "heads": 0}}}, "heads=0"),
        ("openpi", {"action_horizon": True}, "chunk=True"),
        ("openpi", {"paligemma_variant": {"a": 1}}, "uses the stack"),
    ],
)
def test_what_is_said_of_an_entry(folder, kind, change, said):
    copy = folder(kind)
    if kind == "oft":
        (copy / "dataset_statistics.json").unlink()
    edit_json(copy / "config.json", **change)
    refused(copy, kind, str(copy), said)


@pytest.mark.parametrize("kind", ["openvla", "oft", "pi0"])
@pytest.mark.parametrize(
    ("control", "said"),
    [
        ({"execute": 0}, "execute=0"),
        ({"execute": -2}, "execute=-2"),
        ({"execute": 1.5}, "execute=1.5"),
        ({"execute": "2"}, "execute='2'"),
        ({"execute": True}, "execute=True"),
        ({"execute": None}, "execute=None"),
        ({"execute": 99}, "at most"),
        ({"execute": float("nan")}, "execute=nan"),
        ({"gripper": "open"}, "robosuite or rlds"),
        ({"gripper": 1}, "robosuite or rlds"),
        ({"cameras": []}, "different names"),
        ({"cameras": "agentview"}, "different names"),
        ({"cameras": ["a", "b", "c"]}, "different names"),
        ({"cameras": [1, 2]}, "different names"),
        ({"cameras": ["a", "a"]}, "different names"),
        ({"speed": 1}, "unknown entries speed"),
        ({"suites": "libero_spatial"}, "a list of names"),
        ({"suites": []}, "a list of names"),
        ({"suites": [3]}, "a list of names"),
        ({"unnorm_key": 7}, "must be a name"),
        ([2], "control must be an object"),
        ("fast", "control must be an object"),
    ],
)
def test_how_a_policy_is_driven_is_checked_when_it_is_loaded(folder, kind, control, said):
    copy = folder(kind)
    edit_json(copy / "config.json", control=control)
    refused(copy, kind, "config.json", said)


def test_a_control_that_fits(folder):
    copy = folder("oft")
    edit_json(
        copy / "config.json",
        control={
            "execute": 4,
            "cameras": ["front", "hand"],
            "gripper": "rlds",
            "suites": ["my_suite"],
            "unnorm_key": "pick_place",
        },
    )
    assert load(copy, "oft").config.chunk == 4


# -- statistics ----------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def stats(change: Callable[[list[Any]], Any]) -> Callable[[dict[str, Any], str], None]:
    def apply(entry: dict[str, Any], name: str) -> None:
        entry[name] = change(list(entry[name]))

    return apply


BAD_NUMBERS: dict[str, Callable[[list[Any]], Any]] = {
    "nan": lambda v: [NAN, *v[1:]],
    "inf": lambda v: [*v[:-1], INF],
    "minus inf": lambda v: [-INF, *v[1:]],
    "null": lambda v: None,
    "nulls": lambda v: [None] * len(v),
    "strings": lambda v: [str(x) for x in v],
    "one string": lambda v: [*v[:-1], "0.5"],
    "truth values": lambda v: [True] * len(v),
    "nested": lambda v: [v],
    "a number": lambda v: v[0],
    "empty": lambda v: [],
    "short": lambda v: v[:-1],
    "long": lambda v: [*v, v[-1]],
    "huge": lambda v: [*v[:-1], 1e300],
    "an object": lambda v: {"0": v},
}


@pytest.mark.parametrize("name", ["q01", "q99"])
@pytest.mark.parametrize("what", ["action", "proprio"])
@pytest.mark.parametrize("damage", BAD_NUMBERS)
def test_statistics_that_are_no_numbers(folder, damage, what, name):
    for kind in ("openvla", "oft") if what == "action" else ("oft",):
        copy = folder(kind)
        file = copy / "dataset_statistics.json"
        values = json.loads(file.read_text())
        entry = values["pick_place"][what]
        entry[name] = BAD_NUMBERS[damage](entry[name])
        file.write_text(json.dumps(values))
        refused(copy, kind, file.name, f"{what} statistics 'pick_place'")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e.update(q01=e["q99"], q99=e["q01"]), "q01 is above q99 in the dimensions"),
        (lambda e: e.update(mask=["True"] * 6 + ["False"]), "true and false"),
        (lambda e: e.update(mask=None), "true and false"),
        (lambda e: e.update(mask=True), "true and false"),
        (lambda e: e.update(mask=[True] * 6), "mask (6,)"),
        (lambda e: e.update(mask=[2] * 7), "true and false"),
        (lambda e: e.update(mask=[[True] * 7]), "true and false"),
        (lambda e: e.pop("q01"), "no q01/q99"),
        (lambda e: e.clear(), "no q01/q99"),
    ],
)
def test_statistics_that_cannot_be(folder, change, said):
    for kind in ("openvla", "oft"):
        copy = folder(kind)
        file = copy / "dataset_statistics.json"
        values = json.loads(file.read_text())
        change(values["libero_spatial_no_noops"]["action"])
        file.write_text(json.dumps(values))
        refused(copy, kind, file.name, said)


@pytest.mark.parametrize("content", [{"a": [1]}, {"a": None}, {"q01": [0.0] * 7}, {"a": {"b": 1}}])
def test_statistics_of_another_layout(folder, content):
    copy = folder("oft")
    (copy / "dataset_statistics.json").write_text(json.dumps(content))
    refused(copy, "oft", "dataset_statistics.json", "no q01/q99")


def test_statistics_with_ones_and_zeros_for_a_mask_and_constant_entries_are_right(folder):
    copy = folder("openvla")
    expected = act(load(copy, "openvla"))
    file = copy / "dataset_statistics.json"
    values = json.loads(file.read_text())
    values["pick_place"]["action"]["mask"] = [1, 1, 1, 1, 1, 1, 0]
    file.write_text(json.dumps(values))
    assert (act(load(copy, "openvla")) == expected).all()
    values["pick_place"]["action"]["q01"][2] = values["pick_place"]["action"]["q99"][2]
    file.write_text(json.dumps(values))
    assert act(load(copy, "openvla"))[0, 2] == np.float32(values["pick_place"]["action"]["q01"][2])


@pytest.mark.parametrize("damage", BAD_NUMBERS)
@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("what", ["state", "actions"])
def test_statistics_of_openpi_that_are_no_numbers(folder, damage, name, what):
    copy = folder("openpi")
    file = copy / "assets/robot/norm_stats.json"
    values = json.loads(file.read_text())
    entry = values["norm_stats"][what]
    entry[name] = BAD_NUMBERS[damage](entry[name])
    file.write_text(json.dumps(values))
    refused(copy, "openpi", str(copy))


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e38])
@pytest.mark.parametrize("what", ["observation.state", "action"])
def test_statistics_of_lerobot_that_are_no_numbers(folder, kind, what, value):
    copy = folder(kind)
    (file,) = copy.glob("policy_preprocessor*.safetensors")
    tensors = load_file(file)
    names = ("mean", "std") if kind == "pi0" else ("q01", "q99")
    for name in names:
        changed = {k: v.clone() for k, v in tensors.items()}
        changed[f"{what}.{name}"][1] = value
        save_file(changed, file)
        refused(copy, kind, str(copy), "statistics")
    low, high = (tensors[f"{what}.{name}"] for name in names)
    tensors |= {f"{what}.{names[0]}": high, f"{what}.{names[1]}": low if kind == "pi05" else -high}
    save_file(tensors, file)
    refused(copy, kind, str(copy), "statistics")


# -- tensors -------------------------------------------------------------------------------------

BROKEN = {
    "openvla": [
        "vision_backbone.featurizer.pos_embed",
        "vision_backbone.fused_featurizer.blocks.1.mlp.fc1.bias",
        "projector.fc2.weight",
        "language_model.model.layers.3.self_attn.q_proj.weight",
        "language_model.lm_head.weight",
    ],
    "pi0": [
        "model.state_proj.bias",
        "model.action_out_proj.weight",
        "model.paligemma_with_expert.gemma_expert.model.layers.2.mlp.up_proj.weight",
        "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight",
    ],
}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["openvla", "pi0"])
def test_weights_that_are_no_numbers(folder, kind, dtype, value):
    copy = folder(kind)
    file = copy / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    for name in BROKEN[kind]:
        broken = tensors[name].clone()
        broken.view(-1)[-1] = value
        save_file(tensors | {name: broken}, file)
        refused(copy, kind, str(copy), name.removeprefix("model."), "model.safetensors")


@pytest.mark.parametrize("head", ["action_head", "proprio_projector"])
@pytest.mark.parametrize("suffix", [".safetensors", "--150000_checkpoint.pt"])
def test_heads_that_are_no_numbers(folder, head, suffix):
    copy = folder("oft")
    tensors = load_file(copy / f"{head}.safetensors")
    (copy / f"{head}.safetensors").unlink()
    name = next(name for name in tensors if name.endswith("fc1.weight"))
    tensors[name][0, 0] = NAN
    (save_file if suffix == ".safetensors" else torch.save)(tensors, copy / f"{head}{suffix}")
    refused(copy, "oft", f"{head}{suffix}", f"{head}.{name}")


def test_numbers_that_the_asked_dtype_cannot_hold(folder):
    copy = folder("openvla")
    file = copy / "model.safetensors"
    tensors = load_file(file)
    tensors["projector.fc1.bias"][3] = 1e6
    save_file(tensors, file)
    assert vp.models.load(copy).dtype == torch.float32
    with pytest.raises(CheckpointError, match=r"projector\.fc1\.bias as float16"):
        vp.models.load(copy, dtype=torch.float16)


def test_tensors_of_another_kind_or_that_come_twice(folder):
    copy = folder("openvla")
    file = copy / "model.safetensors"
    tensors = load_file(file)
    quantised = tensors["projector.fc1.weight"].to(torch.int8)
    save_file(tensors | {"projector.fc1.weight": quantised}, file)
    refused(copy, "openvla", str(copy), "projector.fc1.weight int8")
    again = tensors["projector.fc1.weight"].clone()
    save_file(tensors | {"module.projector.fc1.weight": again}, file)
    refused(copy, "openvla", str(copy), "come twice (1): projector.fc1.weight")


def test_sizes_are_compared_before_memory_is_taken(folder, monkeypatch):
    copy = folder("openvla")
    raw = json.loads((copy / "config.json").read_text())
    raw["text_config"]["intermediate_size"] = 1 << 24
    (copy / "config.json").write_text(json.dumps(raw))

    def allocate(self, **options):
        raise AssertionError("memory was taken")

    monkeypatch.setattr(torch.nn.Module, "to_empty", allocate)
    refused(copy, "openvla", str(copy), "another shape")


# -- heads of OpenVLA-OFT, as training leaves them ------------------------------------------------

AROUND = ("_orig_mod.", "base_model.model.", "module.", "_fsdp_wrapped_module.")


@pytest.mark.parametrize(
    "prefix",
    [
        *AROUND,
        *(a + b for a in AROUND for b in AROUND),
        "module._orig_mod.base_model.model.module.",
        "base_model.model._orig_mod.module._orig_mod.",
    ],
)
@pytest.mark.parametrize("head", ["action_head", "proprio_projector"])
def test_what_training_puts_around_a_head_is_taken_off(folder, head, prefix):
    copy = folder("oft")
    expected = act(load(copy, "oft"))
    file = copy / f"{head}.safetensors"
    state = {prefix + name: tensor for name, tensor in load_file(file).items()}
    file.unlink()
    torch.save(state, copy / f"{head}--150000_checkpoint.pt")
    assert (act(load(copy, "oft")) == expected).all()


@pytest.mark.parametrize(
    "nest",
    [
        lambda s: {"state_dict": s},
        lambda s: {"model_state_dict": s, "epoch": 3, "loss": torch.tensor(0.1)},
        lambda s: {"model": {"module": {"state_dict": s}}},
        lambda s: {"state_dict": {f"model._orig_mod.{n[6:]}": t for n, t in s.items()}},
        lambda s: {f"action_head.{n}": t for n, t in s.items()},
        lambda s: {f"module.action_head._orig_mod.{n}": t for n, t in s.items()},
    ],
)
@pytest.mark.parametrize("published", [False, True])
def test_a_head_inside_other_things(folder, nest, published, monkeypatch):
    copy = folder("oft")
    expected = act(load(copy, "oft"))
    file = copy / "action_head.safetensors"
    torch.save(nest(load_file(file)), copy / "action_head--5_checkpoint.pt")
    file.unlink()
    if published:
        forget_ours(copy, monkeypatch)
    loaded = openvla.from_pretrained(copy, chunk=4, empty_token_id=4)
    assert (act(loaded) == expected).all()


def forget_ours(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the original code writes it: sizes are read from the heads."""
    from tiny_openvla import towers

    names = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
    monkeypatch.setattr(
        openvla.checkpoint, "PUBLISHED_TOWERS", dict(zip(names, towers(), strict=True))
    )
    edit_json(copy / "config.json", vla_pruner=None, timm_model_ids=names, image_sizes=[32, 32])


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda s: {n.replace("model.", "net."): t for n, t in s.items()}, "net.fc2.weight"),
        (lambda s: {f"lora.{n}": t for n, t in s.items()}, "lora.model.fc2.weight"),
        (lambda s: {}, "no tensors by name"),
        (lambda s: [1, 2], "no tensors by name"),
        (lambda s: torch.zeros(3), "no tensors by name"),
        (lambda s: {"state_dict": {}}, "no tensors by name"),
        (lambda s: s | {"step": 5}, "'step' is a int"),
        (lambda s: {"weights": s}, "'weights' is a"),
        (lambda s: {3: torch.zeros(1)}, "3 is a Tensor"),
        (lambda s: {**s, "model.fc2.weight": torch.zeros(3)}, "model.fc2.weight"),
    ],
)
def test_a_head_that_is_none_says_what_was_found(folder, make, said, published, monkeypatch):
    copy = folder("oft")
    file = copy / "action_head.safetensors"
    torch.save(make(load_file(file)), copy / "action_head--5_checkpoint.pt")
    file.unlink()
    if published:
        forget_ours(copy, monkeypatch)
    refused(copy, "oft", str(copy), said)


def test_names_are_plain_wherever_something_was_put_in():
    for name in ("model.fc1.weight", "vision_backbone.featurizer.blocks.0.attn.qkv.weight"):
        assert plain_name(name) == name
    assert (
        plain_name("module.model._orig_mod.layers.0._fsdp_wrapped_module.w") == "model.layers.0.w"
    )
    assert plain_name("base_model.model.base_model.model.fc1") == "fc1"


@pytest.mark.parametrize("kind", ["openvla", "pi0"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "base_model.model.", "module._orig_mod."])
def test_the_model_itself_may_be_wrapped_too(folder, kind, prefix):
    copy = folder(kind)
    expected = act(load(copy, kind))
    file = copy / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file)
    assert (act(load(copy, kind)) == expected).all()


def test_an_adapter_that_was_never_merged(folder):
    copy = folder("oft")
    (copy / "model.safetensors").unlink()
    (copy / "lora_adapter").mkdir()
    (copy / "lora_adapter" / "adapter_config.json").write_text("{}")
    refused(copy, "oft", "lora_adapter is an adapter, merge it first")


# -- folders made to harm ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "{outside}", "a/../../outside.safetensors", "..", ".", "", 7, None,
     ["model.safetensors"], "model.safetensors/", "sub/model.safetensors", "x\x00y"],
)  # fmt: skip
def test_an_index_names_files_of_its_folder_alone(folder, kind, name):
    copy = folder(kind)
    outside = copy.parent / "outside.safetensors"
    shutil.copy(copy / "model.safetensors", outside)
    if isinstance(name, str):
        name = name.format(outside=outside)
    index = {"weight_map": dict.fromkeys(load_file(outside), name)}
    if isinstance(name, list):
        index = {"weight_map": {"a": name}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copy, kind, "model.safetensors.index.json")


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": 3}])
def test_an_index_without_a_map(folder, content):
    copy = folder("openvla")
    (copy / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(copy, "openvla", "model.safetensors.index.json", "weight_map")


@pytest.mark.parametrize("kind", KINDS)
def test_links_do_not_lead_out_of_the_folder(folder, kind):
    names = ["config.json", "model.safetensors", "tokenizer.json", *json_files(kind)]
    for name in names + ["action_head.safetensors"] * (kind == "oft"):
        copy = folder(kind)
        outside = copy.parent / "outside"
        (copy / name).rename(outside)
        (copy / name).symlink_to(outside)
        refused(copy, kind, Path(name).name, "leads out of the folder")
        outside.unlink()


def test_links_inside_the_folder_and_in_the_hubs_cache_are_followed(originals, tmp_path):
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / "abc"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(originals["oft"].iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert np.isfinite(act(vp.models.load(snapshot))).all()
    link = tmp_path / "link"
    link.symlink_to(originals["oft"])
    assert np.isfinite(act(vp.models.load(link))).all()


def test_the_package_itself_may_be_installed_as_links(originals, tmp_path, monkeypatch):
    policy = tmp_path / "site-packages" / "policy"
    policy.mkdir(parents=True)
    for file in originals["openvla"].iterdir():
        (policy / file.name).symlink_to(file)
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        vp.models.load(policy)
    monkeypatch.setattr("vla_pruner.models.given.folder._PACKAGE", tmp_path / "site-packages")
    assert np.isfinite(act(vp.models.load(policy))).all()


def test_a_normalizer_is_read_from_the_folder_alone(folder):
    copy = folder("pi0")
    (file,) = copy.glob("policy_preprocessor*.safetensors")
    file.rename(copy.parent / file.name)
    path = copy / "policy_preprocessor.json"
    path.write_text(path.read_text().replace(file.name, f"../{file.name}"))
    refused(copy, "pi0", path.name, "no file of its folder")


@pytest.mark.parametrize("kind", [*KINDS, "foreign"])
def test_no_code_of_a_folder_runs(folder, kind, tmp_path, monkeypatch):
    """Neither Python files that config.json names, nor a question whether they may."""
    copy = folder("openvla" if kind == "foreign" else kind)
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PretrainedConfig\n"
    for name in ("evil", "configuration_prismatic", "tokenization"):
        (copy / f"{name}.py").write_text(f"{code}class C(PretrainedConfig): model_type = 'evil'\n")
    edit_json(
        copy / "config.json",
        auto_map={"AutoConfig": "evil.C", "AutoModelForImageTextToText": "evil.C"},
    )
    (copy / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.C", None]}, "tokenizer_class": "C"})
    )
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("it asked"))
    if kind == "foreign":
        edit_json(copy / "config.json", model_type="evil")
        with pytest.raises(CheckpointError, match="code is not run here"):
            vp.models.load(copy)
        with pytest.raises(ValueError, match="not run here"):
            vp.models.load(copy, trust_remote_code=True)
    else:
        assert np.isfinite(act(load(copy, kind))).all()
    assert not (tmp_path / "ran").exists()


# -- models that transformers loads ---------------------------------------------------------------


def test_other_models_are_loaded_whole_and_finite_or_not_at_all(tmp_path):
    """transformers would fill in random numbers, and say so in the log alone."""
    model, _, _ = llava()
    model.save_pretrained(tmp_path)
    assert type(vp.models.load(tmp_path)) is type(model)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("k_proj.weight"))
    save_file({n: t for n, t in tensors.items() if n != name}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors: .*k_proj\.weight"):
        vp.models.load(tmp_path)
    tensors[name][0, 0] = NAN
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"infinite numbers in .*k_proj\.weight"):
        vp.models.load(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        vp.models.load(tmp_path)
