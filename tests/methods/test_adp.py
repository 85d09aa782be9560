"""VLA-ADP prunes by first-layer products, and only while the robot moves far."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vla_pruner as vp
from checks import near
from vla_pruner.methods import Evidence, ScoreSpec, StepContext, build


def gate(values, **options) -> list[bool]:
    """Whether each step of an episode prunes; `values[t]` is reported after step t."""
    method, pruned, since = build("vla-adp", **options), [], 0
    for step in range(len(values) + 1):
        context = StepContext(step=step, since_full=since, motion=tuple(values[:step]))
        full = method.full_step(context)
        since = 0 if full else since + 1
        pruned.append(not full)
    return pruned


def slow_gate(values, window, between, most):
    """The rule as a small machine."""
    state, run, pruned = 0, 0, []
    for step in range(len(values) + 1):
        seen = values[:step]
        if len(seen) < window:
            state = 0
        else:
            previous = seen[-window:-1]
            if seen[-1] >= max(previous):
                state = 1
            elif seen[-1] < min(previous):
                state = 0
            elif between == "prune":
                state = 1
        if state == 1 and run == most:
            state = 0
        run = run + 1 if state else 0
        pruned.append(state == 1)
    return pruned


@given(
    values=st.lists(st.integers(0, 6).map(float), max_size=20),
    window=st.integers(2, 4),
    between=st.sampled_from(["prune", "hold"]),
    most=st.integers(1, 4),
)
def test_the_extrema_gate_equals_the_slow_machine(values, window, between, most):
    found = gate(values, window=window, between=between, most_in_a_row=most)
    assert found == slow_gate(values, window, between, most)


def test_the_extrema_gate_by_hand():
    # Too few values; a new maximum; in between; a new minimum; a maximum again.
    assert gate([1, 2, 3, 2, 1, 4]) == [False, False, False, True, True, False, True]
    assert gate([1, 2, 3, 2, 1, 4], between="hold")[4] is True
    assert gate([3, 3, 1, 2, 4], between="hold") == [False, False, False, False, False, True]


def test_at_most_three_steps_in_a_row_are_pruned():
    assert gate([1.0] * 9) == [False] * 3 + [True] * 3 + [False] + [True] * 3


def test_the_average_gate():
    # Averages before each value: -, 4, 4, 5, 3.5.
    assert gate([4, 4, 6, 2, 9], gate="average") == [False, False, True, True, False, True]


def test_no_gate_asks_for_nothing():
    assert gate([], gate="none") == [True]
    assert build("vla-adp").needs == ("motion",)
    assert build("vla-adp", gate="none").needs == ()
    assert build("vla-adp", gate="none", rows="text").needs == ("text",)


# ---------------------------------------------------------------------- budget and choice
@pytest.mark.parametrize(
    ("options", "views", "shares"),
    [
        ({}, (256, 256), (62, 92)),
        ({}, (256,), (77,)),
        ({}, (20, 20, 10), (6, 6, 3)),
        ({"shares": (0.5, 0.5)}, (256, 256), (77, 77)),
        ({"keep": 1.0}, (10, 4), (10, 4)),
        ({"keep": 10}, (20, 20), (4, 6)),
        ({"keep": 0.01}, (16, 16), (0, 1)),
    ],
)
def test_shares_of_cameras(options, views, shares):
    method = build("vla-adp", **{"keep": 0.3, **options})
    total = sum(shares)
    assert method.schedule(views, 8) == (total,) and method.kept(views) == total
    assert method.split(views, total) == shares
    keep = method.keep
    assert total == (keep if isinstance(keep, int) else max(1, round(sum(views) * keep)))


def test_the_largest_products_of_each_camera_stay():
    semantic = torch.rand(2, 24, generator=torch.Generator().manual_seed(0))
    given_evidence = Evidence(torch.zeros(2, 24, 3), semantic, None, (12, 12), 0, keep_count=10)
    kept = build("vla-adp", keep=10).select(given_evidence)
    for row in range(2):
        first = semantic[row, :12].topk(4).indices.sort().values.tolist()
        second = (12 + semantic[row, 12:].topk(6).indices.sort().values).tolist()
        assert kept[row].tolist() == first + second
    everywhere = build("vla-adp", keep=10, budget="global").select(given_evidence)
    assert torch.equal(everywhere, semantic.topk(10).indices.sort(dim=1).values)
    with pytest.raises(ValueError, match="needs the semantic score"):
        build("vla-adp", keep=10).select(dataclasses.replace(given_evidence, semantic=None))


def test_products_are_read_in_the_layer_about_to_run():
    for layer in (0, 2):
        method = build("vla-adp", layer=layer)
        assert method.cuts(8) == (layer,)
        assert method.scores(layer) == {"semantic": ScoreSpec(layer=layer, kind="logits")}
    assert build("vla-adp", rows="text").scores(0)["semantic"].rows == "text"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "always"}, "'extrema', 'average', 'none'"),
        ({"between": "skip"}, "'prune', 'hold'"),
        ({"rows": "last"}, "'all', 'text'"),
        ({"positions": "new"}, "'keep', 'compact'"),
        ({"window": 1}, "window=1"),
        ({"most_in_a_row": 0}, "most_in_a_row=0"),
        ({"shares": (0.4, 0.4)}, "sum to 1"),
        ({"shares": (1.5, -0.5)}, "positive"),
        ({"shares": ()}, "positive and sum to 1"),
        ({"shares": (0.4, 0.6), "budget": "global"}, "leave one of them out"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("vla-adp", **options)


def test_shares_for_other_cameras_are_refused():
    with pytest.raises(ValueError, match="for 2 cameras, but the input has 3"):
        build("vla-adp", shares=(0.4, 0.6)).schedule((9, 9, 9), 8)


# ---------------------------------------------------------------------- on a model
def slow_products(model, embeds, visual):
    """Mean over rows and heads of q.k, one product at a time."""
    layer = model.model.layers[0]
    x = layer.input_layernorm(embeds)[0]
    query = layer.self_attn.q_proj(x).view(len(x), 4, 8)
    key = layer.self_attn.k_proj(x).view(len(x), 2, 8)
    products = [
        [float(query[i, h] @ key[m, h // 2]) / 8**0.5 for i in range(len(x)) for h in range(4)]
        for m in range(visual.start, visual.stop)
    ]
    return torch.tensor([sum(row) / len(row) for row in products])


def test_an_episode_is_gated_by_what_is_reported(decoders, embeds):
    model, where = decoders(), slice(1, 21)
    motion, pruned = [1, 2, 3, 2, 1, 4], []
    adapter = vp.models.Decoder("model.layers", visual=where)
    with vp.prune(model, "vla-adp", keep=0.3, adapter=adapter) as session:
        for step in range(7):
            model(inputs_embeds=embeds(step))
            pruned.append(session.last.visual_kept == 6)
            if pruned[-1]:
                scores = slow_products(model, embeds(step), where)
                assert session.last.kept_indices[0].tolist() == sorted(scores.topk(6).indices)
            if step < 6:
                session.motion(motion[step])
    assert pruned == gate(motion)
    with vp.prune(model, "vla-adp", adapter=adapter) as session:
        model(inputs_embeds=embeds())
        with pytest.raises(ValueError, match=r"call `session\.motion\(distance\)`"):
            model(inputs_embeds=embeds())


def test_a_batch_where_one_robot_moves_and_one_stands(decoders, embeds):
    model, adapter = decoders(), vp.models.Decoder("model.layers", visual=slice(1, 21))

    def episode(session, rows, motion):
        session.reset()
        session.episodes(rows)
        for step in range(4):
            logits = model(inputs_embeds=embeds(step, batch=2)[rows]).logits[:, -1]
            for row in rows:
                session.motion(motion[row][step], row)
        return logits

    motion = [[1.0, 2.0, 3.0, 0.0], [3.0, 2.0, 1.0, 0.0]]
    with vp.prune(model, "vla-adp", keep=0.3, adapter=adapter) as session:
        together, report = episode(session, [0, 1], motion), session.last
        assert report.warm_up.tolist() == [False, True]
        assert report.kept_mask.sum(dim=1).tolist() == [6, 20]
        for row in (0, 1):
            alone = episode(session, [row], motion)
            assert torch.equal(session.last.kept_mask[0], report.kept_mask[row])
            near(alone[0], together[row])
