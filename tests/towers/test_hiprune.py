"""HiPrune: its choice against a slow version, and towers' attention against what they compute."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hf_vlm import IMAGE, inputs_for, llava, paligemma
from tiny_openvla import make_oft, observation
from tiny_pi0 import make as make_pi0
from tiny_pi0 import observation as pi0_observation
from torch import Tensor, nn

import vla_pruner as vp
from checks import near
from vla_pruner.methods import Evidence, build
from vla_pruner.models import find_adapter
from vla_pruner.models.adapters.openvla import OpenVLAPolicyAdapter
from vla_pruner.models.towers import of_transformers
from vla_pruner.towers.hiprune import places
from vla_pruner.towers.reading import Tower, TowerScores

# -- the choice ------------------------------------------------------------------------------------


def distinct(*shape: int, seed: int) -> Tensor:
    """Numbers of which no two in a row are nearly equal."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(shape[1], generator=generator) for _ in range(shape[0])]
    return (torch.stack(rows).float() + 1) / (10 * shape[1])


def shown(views: tuple[int, ...], columns: int | None, seed: int, valid=None) -> Evidence:
    size = sum(views)
    line, column = places(views, columns)
    found = {
        "middle": distinct(2, size, seed=seed),
        "last": distinct(2, size, seed=seed + 1),
        "line": line.expand(2, -1),
        "column": column.expand(2, -1),
    }
    features = torch.zeros(2, size, 3)
    return Evidence(features, None, None, views, 0, valid=valid, scores=found)


def slowly(middle: list[float], last: list[float], width: int, k: int, alpha: float) -> list[int]:
    """One camera, token by token."""
    size = len(middle)
    wanted = min(k, max(1, round(alpha * k / 5)))
    anchors = sorted(range(size), key=lambda i: -middle[i])[:wanted]
    buffers = []
    for anchor in anchors:
        row, column = divmod(anchor, width)
        for r, c in ((row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)):
            cell = r * width + c
            inside = 0 <= c < width and 0 <= r < size // width
            if inside and cell not in anchors and cell not in buffers:
                buffers.append(cell)
    kept = [*anchors, *sorted(buffers, key=lambda i: -middle[i])][:k]
    for token in sorted(range(size), key=lambda i: -last[i]):
        if len(kept) < k and token not in kept:
            kept.append(token)
    return sorted(kept)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 6),
    cameras=st.integers(1, 3),
    k=st.integers(1, 36),
    alpha=st.floats(0.02, 1.0),
    seed=st.integers(0, 10**6),
)
def test_anchors_their_neighbours_and_registers(rows, width, cameras, k, alpha, seed):
    size = rows * width
    k = min(k, size)
    evidence = shown((size,) * cameras, width, seed)
    method = build("hiprune", keep=k, alpha=alpha, columns=width)
    kept = method.select(evidence)
    for row in range(2):
        expected = []
        for camera in range(cameras):
            span = slice(camera * size, (camera + 1) * size)
            scores = [evidence.scores[name][row, span].tolist() for name in ("middle", "last")]
            chosen = range(size) if k == size else slowly(*scores, width, k, alpha)
            expected += [camera * size + token for token in chosen]
        assert kept[row].tolist() == expected


def test_a_corner_has_two_neighbours_and_cameras_none_of_each_other():
    evidence = shown((9, 9), None, seed=0)
    middle = torch.full((2, 18), 0.01) + 0.001 * distinct(2, 18, seed=3)
    middle[0, 0], middle[1, 8] = 1.0, 1.0  # a corner; the last cell of the first camera
    last = torch.zeros(2, 18) + 0.001 * distinct(2, 18, seed=4)
    last[:, 4] = 1.0
    evidence.scores["middle"], evidence.scores["last"] = middle, last
    kept = build("hiprune", keep=4, budget="global").select(evidence)
    assert kept.tolist() == [[0, 1, 3, 4], [4, 5, 7, 8]]


def test_tokens_of_a_missing_camera_are_no_anchors():
    valid = torch.ones(2, 18, dtype=torch.bool)
    valid[1, :9] = False
    evidence = shown((9, 9), None, seed=5, valid=valid)
    evidence.scores["middle"][1, :9] = 5.0
    kept = build("hiprune", keep=6, budget="global").select(evidence)
    assert kept.shape == (2, 6) and kept[1].ge(9).all()


def test_selection_compiles_into_one_graph():
    evidence, method = shown((9, 9), None, seed=6), build("hiprune", keep=4)

    def select(middle, last):
        scores = {**evidence.scores, "middle": middle, "last": last}
        return method.select(Evidence(evidence.features, None, None, (9, 9), 0, scores=scores))

    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    inputs = evidence.scores["middle"], evidence.scores["last"]
    assert torch.equal(compiled(*inputs), select(*inputs))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"`alpha=0\.0` must lie in"):
        build("hiprune", alpha=0.0)
    with pytest.raises(ValueError, match="not a square"):
        places((8,), None)
    with pytest.raises(ValueError, match="needs the tower's attention"):
        build("hiprune", keep=2).select(Evidence(torch.zeros(1, 9, 3), None, None, (9,), 0))
    tower = Tower("eyes", (nn.Identity(),) * 4)
    assert build("hiprune").layers_of(tower) == (1, 3)
    assert build("hiprune").layers_of(Tower("eyes", (nn.Identity(),) * 24)) == (8, 23)
    with pytest.raises(ValueError, match="'eyes' runs 4 layers; use at most 4"):
        build("hiprune", middle=5).layers_of(tower)
    with pytest.raises(ValueError, match="has 2 vision towers"):
        vp.prune(make_oft(), "hiprune", tower=2)


# -- what towers show ------------------------------------------------------------------------------


def listened(session) -> list[dict[int, Tensor]]:
    """What the tower showed in each step, as it is handed over."""
    reading, kept = session._cut.tower_scores, []
    take = reading.take
    reading.take = lambda *size: kept.append(take(*size)) or kept[-1]
    return kept


def received(x: Tensor, query: nn.Module, key: nn.Module, heads: int, prefix: int) -> Tensor:
    """Mean attention of an attention's input `[n, N, D]`, head by head."""
    width = x.shape[2] // heads
    total = torch.zeros(x.shape[:2])
    for head in range(heads):
        span = slice(head * width, (head + 1) * width)
        products = query(x)[..., span] @ key(x)[..., span].transpose(1, 2) * width**-0.5
        total += products.softmax(dim=-1).mean(dim=1)
    return (total / heads)[:, prefix:]


@pytest.mark.parametrize("which", [0, 1])
def test_openvla_shows_what_its_towers_compute(which):
    model = make_oft()
    tower = find_adapter(model).towers()[which]
    inputs: dict[int, Tensor] = {}
    for layer, attention in enumerate(tower.attentions):
        attention.register_forward_pre_hook(
            lambda module, args, layer=layer: inputs.__setitem__(layer, args[0])
        )
    cameras = model.config.num_images
    with torch.no_grad(), vp.prune(model, "hiprune", keep=0.5, tower=which) as session:
        kept = listened(session)
        session.episodes([0, 1])
        step = [observation(1, cameras, "lift"), observation(2, cameras, "pick up the can")]
        model.predict_actions(step)
        note = kept[0]
    assert len(tower.attentions) == (2, 3)[which] and tower.prefix == (5, 0)[which]
    for layer, found in note.items():
        attention, x = tower.attentions[layer], inputs[layer]
        d = x.shape[2]

        def part(i, attention=attention, d=d):
            weight, bias = attention.qkv.weight, attention.qkv.bias
            span = slice(i * d, (i + 1) * d)
            return lambda given: nn.functional.linear(given, weight[span], bias[span])

        expected = received(x, part(0), part(1), attention.heads, tower.prefix)
        near(found, expected.reshape(2, -1), rel=1e-5)


def test_pi0_shows_what_its_tower_computes():
    model = make_pi0()
    tower = find_adapter(model).towers()[0]
    inputs: list[Tensor] = []
    tower.attentions[-1].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    rows = [pi0_observation(i) | {"instruction": "pick up the can"} for i in (1, 2)]
    with torch.no_grad(), vp.prune(model, "hiprune", keep=0.5, positions="keep") as session:
        kept = listened(session)
        model.sample(model.prepare(rows))
        note = kept[0]
    last = tower.attentions[-1]
    expected = received(inputs[0], last.q_proj, last.k_proj, last.heads, 0)
    near(note[len(tower.attentions) - 1], expected.reshape(2, -1), rel=1e-5)


@pytest.mark.parametrize("made", [llava, paligemma])
def test_towers_of_transformers_show_what_they_report_themselves(made):
    torch.manual_seed(0)
    model, ids, pixels = made()
    model.eval()
    assert len(of_transformers(model)) == 1
    tower = of_transformers(model)[0]
    inputs = inputs_for(model, ids, pixels, batch=2)
    reading = TowerScores(tower, range(len(tower.attentions)))
    model.set_attn_implementation("eager")
    with torch.no_grad(), ExitStack() as undo:
        reading.attach(undo)
        output = model.model.vision_tower(inputs["pixel_values"], output_attentions=True)
        found = reading.take(2, ids.count(IMAGE))
    assert len(found) == len(output.attentions) - (made is llava)
    for layer, score in found.items():
        near(score, output.attentions[layer].mean(dim=(1, 2))[:, tower.prefix :], rel=1e-5)


def test_other_towers_are_refused_and_say_so():
    odd = SimpleNamespace(qkv=nn.Linear(4, 12), num_heads=2, q_norm=nn.LayerNorm(2))
    with pytest.raises(TypeError, match="it also has q_norm"):
        TowerScores(Tower("timm", (odd,)), [0]).attach(SimpleNamespace(callback=print))
    reading = TowerScores(Tower("eyes", (nn.Identity(),)), [0])
    reading.calls[0] = deque()
    with pytest.raises(ValueError, match="'eyes' showed nothing since"):
        reading.take(1, 9)


def test_openvla_of_its_authors_has_timm_towers_read_before_their_last_block():
    """A double of timm's blocks inside the class's structure."""
    block = lambda: SimpleNamespace(attn=SimpleNamespace(qkv=nn.Linear(4, 12), num_heads=2))  # noqa: E731
    timm = lambda: SimpleNamespace(blocks=[block() for _ in range(4)], num_prefix_tokens=5)  # noqa: E731
    model = nn.Module()
    model.language_model, model.projector = nn.Module(), nn.Linear(2, 2)
    model.vision_backbone = SimpleNamespace(featurizer=timm(), fused_featurizer=timm())
    first, second = OpenVLAPolicyAdapter(model).towers()
    assert len(first.attentions) == 3 and (first.prefix, second.name) == (5, "fused_featurizer")


@pytest.mark.parametrize("calls", [1, 2])
def test_cameras_may_come_in_one_call_or_one_by_one(calls):
    scores = torch.arange(24.0).reshape(4, 6)  # two rows, two cameras, six patches
    reading = TowerScores(Tower("eyes", ()), [0])
    parts = [scores] if calls == 1 else [scores[0::2], scores[1::2]]
    reading.calls[0] = deque([torch.ones(1, 6), *parts])
    assert torch.equal(reading.take(2, 12)[0], scores.reshape(2, 12))
    assert not reading.calls[0]
