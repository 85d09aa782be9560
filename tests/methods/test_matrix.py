"""Every registered method on every family: budget, order, undo, batches, pruned equals masked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_hf_vlm import IMAGE, inputs_for, llava, qwen
from tiny_openvla import make_oft, make_openvla, observation
from tiny_pi0 import make as make_pi0
from tiny_pi0 import observation as pi0_observation
from torch import Tensor, nn

import vla_pruner as vp
from checks import near
from vla_pruner.methods import Method, build
from vla_pruner.methods.recipe import Recipe
from vla_pruner.models import find_adapter
from vla_pruner.models.port import default_dtype
from vla_pruner.models.recipes import stamp_model

SENTENCES = ["pick up the can", "lift the milk slowly now"]

# What makes each method prune a stack of four layers at its second step at the latest.
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "random": dict(keep=0.25, layer=0),
    "fastv": dict(keep=0.25, layer=2),
    "vla-pruner": dict(keep=0.25, layer=2, window=1),
    "vla-pruner-release": dict(keep=0.25, layer=2, window=1),
    "sparsevlm": dict(keep=0.4, count="behind", group=2, recycle=0.8),
    "sparsevlm-release": dict(keep=0.25, layer=2),
    "divprune": dict(keep=0.25),
    "holov": dict(keep=0.5, layer=1, crops=3),
    "vla-cache": dict(keep=0.4, layers=(1, 2), threshold=-1.0),
    "vla-adp": dict(keep=0.3, gate="none"),
    "pact": dict(layer=2, window=1),
    "cdpruner": dict(keep=0.25),
    "team-vla": dict(keep=0.2, layer=1, context=0.0, chance=0.0, tau=9.0),
    "scope": dict(keep=0.25, layer=2),
    "dart": dict(keep=0.25, pivots=2),
    "safe-pruner": dict(keep=0.25, layer=2, gamma=-1.0),
    "vla-iap": dict(keep=0.25, share=0.2, motion=255.0),
    "specprune-vla": dict(keep=0.25),
    "prefix-reuse": dict(threshold=255.0),
    "hiprune": dict(keep=0.25, middle=1),
    "efficientvla": dict(keep=0.5, layer=2, parts="both", skip=1, key=2),
    "fitprune": dict(),
    "vtw": dict(),
    "fixed": dict(indices=(1, 4, 7)),
}

COMPACT = ("sparsevlm", "divprune", "holov", "vla-adp", "cdpruner", "scope", "dart", "hiprune")
"""Methods that can renumber positions."""

LESS_WHEN_SURE = ("safe-pruner", "vla-iap")
"""Methods whose budget is that of some steps, and whose other steps keep more."""

GRIDS = ("team-vla",)
"""Methods that look at neighbours."""


@dataclass(eq=False)
class Family:
    """A model, and how to run it on some of its two scenes at a step."""

    model: nn.Module
    adapter: Callable[[], Any]
    run: Callable[[Sequence[int], int], list[Tensor]]
    visual: int
    sends_frames: bool = False
    renumbers: bool = True  # whether positions="compact" is possible
    columns: int | None = None  # of the grid that its tokens are; None: square

    @cached_property
    def untouched(self) -> list[Tensor]:
        """What both scenes give without pruning."""
        return self.run((0, 1), 1)

    def layers(self) -> int:
        return len(self.adapter().layers)

    def can_run(self, name: str) -> bool:
        adapter = self.adapter()
        if name == "prefix-reuse":
            return hasattr(adapter, "hold_prefix")
        if name == "hiprune":
            return hasattr(adapter, "towers") and bool(adapter.towers())
        return adapter.gives_frames or "frame" not in self.method(name).needs

    def method(self, name: str, **changes: Any) -> Method:
        """A method by its name, with a recipe for this model where it follows one."""
        options, layers = {**OPTIONS.get(name, {}), **changes}, self.layers()
        if not self.renumbers and name in COMPACT:
            options["positions"] = "keep"
        if name in GRIDS:
            options["columns"] = self.columns
        values: dict[str, dict[str, Any]] = {
            "fitprune": {"left": [self.visual, 9, 9] + [2] * (layers - 3)},
            "vtw": {"layer": 2},
            "efficientvla": {"importance": [0.9, 0.8, 0.7, 0.1, 0.5, 0.6][:layers]},
        }
        if name in values:
            stamp = stamp_model(self.model, self.adapter())
            options["recipe"] = Recipe(method=name, model=stamp, values=values[name])
        return build(name, **options)


def openvla(made: nn.Module) -> Family:
    with torch.no_grad():  # attention far from uniform
        for layer in made.language_model.model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
            layer.self_attn.k_proj.weight.mul_(8)
    rows = getattr(made.config, "action_rows", slice(-1, None))
    decoder = made.language_model.model

    def run(scenes: Sequence[int], step: int) -> list[Tensor]:
        found: list[Tensor] = []
        handle = decoder.register_forward_hook(
            lambda module, args, output: found.append(output.last_hidden_state[:, rows])
        )
        cameras = made.config.num_images
        try:
            made.predict_actions([observation(step + 7 * i, cameras, SENTENCES[i]) for i in scenes])
        finally:
            handle.remove()
        return found

    return Family(made, lambda: find_adapter(made), run, sum(made.config.views), True)


def vlm(made: tuple[nn.Module, list[int], tuple[int, ...]]) -> Family:
    model, ids, pixels = made
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15, generator=generator)
    model.eval()

    def run(scenes: Sequence[int], step: int) -> list[Tensor]:
        inputs = inputs_for(model, ids, pixels, batch=len(scenes))
        shape = (len(scenes), -1, *inputs["pixel_values"].shape[1:])
        images = [
            torch.randn(inputs_for(model, ids, pixels)["pixel_values"].shape, generator=seeded)
            for seeded in (torch.Generator().manual_seed(10 * step + i) for i in scenes)
        ]
        inputs["pixel_values"] = torch.stack(images).reshape(shape).flatten(0, 1)
        made = model.generate(
            **inputs,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return list(made.logits)

    return Family(model, lambda: find_adapter(model), run, ids.count(IMAGE))


def pi0() -> Family:
    model = make_pi0()

    def run(scenes: Sequence[int], step: int) -> list[Tensor]:
        rows = [pi0_observation(step + 7 * i) | {"instruction": SENTENCES[i]} for i in scenes]
        return [model.sample(model.prepare(rows))]

    return Family(model, lambda: find_adapter(model), run, sum(model.config.views), renumbers=False)


@pytest.fixture(scope="module")
def families(make, rollout) -> dict[str, Family]:
    with torch.no_grad():
        decoder = make()
        made = {
            "openvla": openvla(make_openvla()),
            "oft": openvla(make_oft()),
            "llava": vlm(llava()),
            "qwen2-vl": vlm(qwen("2")),
            "pi0": pi0(),
        }
    pads = (0, 4)

    def adapter() -> Any:
        found = vp.models.Decoder("model.layers", visual=slice(1, 21))
        found.bind(decoder)
        return found

    def run(scenes: Sequence[int], step: int) -> list[Tensor]:
        """Left-padded rows; a scene alone comes without its padding."""
        generator = torch.Generator().manual_seed(step)
        embeds = torch.randn(2, 34, 32, generator=generator, dtype=torch.float32)
        tokens = torch.arange(6).view(2, 3)
        mask = torch.ones(2, 34, dtype=torch.long)
        for row, pad in enumerate(pads):
            mask[row, :pad] = 0
        if len(scenes) == 2:
            logits = rollout(decoder, embeds, mask=mask, tokens=tokens)
        else:
            (row,) = scenes
            alone = embeds[row : row + 1, pads[row] :]
            logits = rollout(decoder, alone, tokens=tokens[row : row + 1])
        return [part[:, -1] for part in logits]

    made["decoder"] = Family(decoder, adapter, run, 20, columns=5)
    return made


@contextmanager
def pruned(family: Family, method: Method, mode: str = "drop") -> Iterator[Any]:
    adapter = family.adapter()
    with vp.prune(family.model, method, adapter=adapter, mode=mode) as session:  # type: ignore
        yield session


def steps(family: Family, session: Any, scenes: Sequence[int]) -> list[Tensor]:
    """What the scenes give once the method has warmed up."""
    session.reset()
    session.episodes(list(scenes))
    method = session.method
    begins = ("prefix-reuse", "specprune-vla")  # with all tokens
    if method.history is not None or recalls(method, family) or method.name in begins:
        one_step(family, session, scenes, 0)
    return one_step(family, session, scenes, 1)


def one_step(family: Family, session: Any, scenes: Sequence[int], step: int) -> list[Tensor]:
    """A step, with frames for methods that compare them."""
    if "frame" in session.method.needs and not family.sends_frames:
        width = 4 * family.visual
        seeded = [torch.Generator().manual_seed(100 * step + scene) for scene in scenes]
        frames = [torch.rand(3, 4, width, generator=g, dtype=torch.float32) for g in seeded]
        session.frame(torch.stack(frames))
    return family.run(scenes, step)


def recalls(method: Method, family: Family) -> bool:
    """Whether tokens leave that others still see as they were a step ago."""
    return method.name == "vla-cache"


def masks(session: Any) -> list[Tensor]:
    return [stage.kept_mask for stage in session.last.stages]


def close(ones: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(ones, others, strict=True):
        near(one, other, rel=2e-05)


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def apart(ones: list[Tensor], others: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ones, others, strict=True))


def check_counts(family: Family, method: Method, report: Any) -> None:
    """Each stage holds what was planned, of what the one before held; each layer computes that."""
    views = getattr(getattr(family.model, "config", None), "views", (family.visual,))
    depth = family.layers()
    cuts, skipped = method.cuts(depth), method.skipped(depth)
    assert [stage.layer for stage in report.stages] == list(cuts)
    planned = method.schedule(tuple(views), depth) if cuts else ()
    kept = [stage.kept_mask for stage in report.stages]
    for mask, count in zip(kept, planned, strict=True):
        found = mask.sum(dim=1).tolist()
        if recalls(method, family):
            assert max(found) < count
        elif method.adaptive:
            assert found[0] == found[-1]
            assert found[0] <= count or method.name in LESS_WHEN_SURE
        else:
            assert found == [count] * len(mask)
    everything = torch.ones(len(report.kept_mask), family.visual, dtype=torch.bool)
    for before, after in pairwise([everything, *kept]):
        assert (before | ~after).all(), "a token came back"
    # Rows that reuse more than others are computed to the same length.
    left = [family.visual, *(int(mask.sum(dim=1).max()) for mask in kept)]
    text = report.tokens_full - family.visual
    assert report.tokens_per_layer == tuple(
        0 if layer in skipped else text + left[sum(cut <= layer for cut in cuts)]
        for layer in range(depth)
    )


METHODS = pytest.mark.parametrize("name", list(vp.list_methods()))
FAMILIES = pytest.mark.parametrize("on", ["openvla", "oft", "llava", "decoder", "pi0"])


def test_the_matrix_knows_every_method():
    assert set(OPTIONS) == set(vp.list_methods())


@METHODS
@FAMILIES
def test_method_on_family(families, name, on):
    family = families[on]
    if not family.can_run(name):
        pytest.skip("refused, see test_what_a_family_does_not_have_is_refused")
    method, untouched = family.method(name), family.untouched
    shared = method.adaptive and not recalls(method, family)
    with pruned(family, method) as session:
        together, kept = steps(family, session, (0, 1)), masks(session)
        check_counts(family, method, session.last)
        for row in (0, 1):
            alone = steps(family, session, (row,))
            for number, (one, other) in enumerate(zip(masks(session), kept, strict=True)):
                if shared and number == 0:  # The rows of a batch share the largest budget.
                    assert (other[row] | ~one[0]).all()
                elif not shared:  # (What a later cut then finds is another choice.)
                    assert torch.equal(one[0], other[row])
            if not shared:
                close([part[0] for part in alone], [part[row] for part in together])
    assert equal(family.run((0, 1), 1), untouched), "something was left behind"
    if name == "none":
        assert equal(together, untouched)
        return
    assert apart(together, untouched) > 1e-3
    with pruned(family, method, "mask") as session:
        close(steps(family, session, (0, 1)), together)
        assert equal(masks(session), kept)


@pytest.mark.parametrize(
    ("on", "dtype"),
    [("oft", torch.bfloat16), ("decoder", torch.float64), ("pi0", torch.bfloat16)],
)
@METHODS
def test_the_default_dtype_changes_nothing(families, name, on, dtype):
    """Scripts that load big models set it, and leave it set."""
    family = families[on]
    if not family.can_run(name):
        pytest.skip("refused, see test_what_a_family_does_not_have_is_refused")
    with pruned(family, family.method(name)) as session:
        expected, kept = steps(family, session, (0, 1)), masks(session)
    with default_dtype(dtype), pruned(family, family.method(name)) as session:
        found = steps(family, session, (0, 1))
        assert equal(found, expected) and equal(masks(session), kept)


def test_what_a_family_does_not_have_is_refused(families):
    family = families["oft"]
    with pytest.raises(ValueError, match="holds the prefix of a flow policy"):
        vp.prune(family.model, family.method("prefix-reuse"))
    for on in ("decoder", "qwen2-vl"):
        family = families[on]
        with pytest.raises(ValueError, match="cannot show it for this model"):
            method = family.method("hiprune", positions="keep")
            vp.prune(family.model, method, adapter=family.adapter())


@pytest.mark.parametrize("name", [n for n in OPTIONS if n not in ("fitprune", "vtw", "fixed")])
@FAMILIES
def test_keeping_everything_is_exact(families, name, on):
    family = families[on]
    if not family.can_run(name):
        pytest.skip("refused, see test_what_a_family_does_not_have_is_refused")
    changes = {
        "efficientvla": {"skip": 0},
        "pact": {"levels": ()},
        "prefix-reuse": {"calls": 1},
    }.get(name, {})
    with pruned(family, family.method(name, keep=1.0, **changes)) as session:
        assert equal(steps(family, session, (0, 1)), family.untouched)


@pytest.mark.parametrize("name", COMPACT)
@pytest.mark.parametrize("on", ["oft", "decoder"])
def test_the_other_position_convention(families, name, on):
    """It changes what the model says, not what is kept at the first cut."""
    family, found, kept = families[on], [], []
    if not family.can_run(name):
        pytest.skip("refused, see test_what_a_family_does_not_have_is_refused")
    usual = family.method(name).positions
    for positions in (usual, "keep" if usual == "compact" else "compact"):
        method = family.method(name, positions=positions)
        with pruned(family, method) as session:
            found.append(steps(family, session, (0, 1)))
            kept.append(masks(session)[0])
    with pruned(family, method, "mask") as session:
        close(steps(family, session, (0, 1)), found[1])
    assert torch.equal(*kept)
    assert apart(*found) > 1e-3


@pytest.mark.parametrize("name", ["sparsevlm", "divprune", "vla-adp"])
def test_a_model_with_several_position_axes_keeps_its_positions(families, name):
    family = families["qwen2-vl"]
    with pytest.raises(NotImplementedError, match='Use positions="keep"'):
        vp.prune(family.model, family.method(name))
    method = family.method(name, positions="keep")
    with pruned(family, method) as session:
        dropped = steps(family, session, (0, 1))
        check_counts(family, method, session.last)
    with pruned(family, method, "mask") as session:
        close(steps(family, session, (0, 1)), dropped)
