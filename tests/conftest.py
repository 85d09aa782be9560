"""Tiny decoders with random weights, shared by the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import hypothesis
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from checks import randomise
from vla_pruner.models import matrix

FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "gemma": (GemmaForCausalLM, GemmaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
}
HIDDEN = 32


def seeded(value: int) -> None:
    """torch's generators, as `torch.manual_seed` leaves them.

    That one takes a traceback for CUDA each time, also where there is none: it is slow, and in
    Python 3.12.1 the garbage collector twice crashed in it.
    """
    if torch.cuda.is_available():
        torch.manual_seed(value)
    else:
        torch.default_generator.manual_seed(value)


class TorchRandom:
    """torch's generator, as Hypothesis resets it before each example: what failed fails again."""

    seed = staticmethod(seeded)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_TORCH_RANDOM = TorchRandom()  # Hypothesis itself holds it weakly.
hypothesis.register_random(_TORCH_RANDOM)
# The same examples every time; `--hypothesis-profile default` searches for new ones.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

RECORDED = pytest.StashKey[dict[tuple[str, str, bool, str], matrix.Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--record`: write what the tests prove of model classes into the table of the package."""
    parser.addoption("--record", action="store_true", help="update the table of tested models")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDED] = {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Classes of which a test failed are left as they are in the table."""
    if session.config.getoption("--record") and session.testsfailed == 0:
        matrix.write(list(session.config.stash[RECORDED].values()))


@pytest.fixture
def proves(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Called at the end of a test: what it has just shown of a class."""

    def note(family: str, model: type, *checks: str, double: bool = False, **versions: str) -> None:
        assert set(checks) <= set(matrix.CHECKS)
        for package in ("torch", "transformers", "lerobot"):
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
        row = matrix.Row(family, model.__name__, double, {}, versions)
        row = request.config.stash[RECORDED].setdefault(row.key, row)
        where = request.node.nodeid.partition("[")[0]
        for check in checks:
            tests = row.tests.setdefault(check, [])
            if where not in tests:
                tests.append(where)

    return note


LONGEST = ("runs/test_execute.py", "examples/test_examples.py", "serving/", "doors/", "runs/")
"""Begun first: a process takes whole files, and should not end with the longest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; tests marked `gpu` are skipped where there is none."""

    def turn(item: pytest.Item) -> int:
        path = f"{item.path.parent.name}/{item.path.name}"
        return next((n for n, start in enumerate(LONGEST) if path.startswith(start)), len(LONGEST))

    items.sort(key=turn)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    seeded(0)
    with torch.no_grad():
        yield


def make_decoder(family: str = "llama", attention: str = "sdpa", **options: object) -> nn.Module:
    """A causal language model with 6 layers, 4 query heads on 2 key heads, hidden size 32."""
    kind, config = FAMILIES[family]
    settings: dict[str, object] = dict(
        vocab_size=97,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation=attention,
    )
    return randomise(kind(config(**{**settings, **options})))


@pytest.fixture(scope="session")
def decoders() -> Callable[..., nn.Module]:
    """`make_decoder`, made once per family and attention."""
    made: dict[tuple[str, str], nn.Module] = {}

    def get(family: str = "llama", attention: str = "sdpa") -> nn.Module:
        key = (family, attention)
        if key not in made:
            with torch.no_grad():
                made[key] = make_decoder(family, attention)
        return made[key]

    return get


@pytest.fixture
def embeds() -> Callable[..., Tensor]:
    """Random input embeddings [B, S, HIDDEN], different for each seed."""

    def get(seed: int = 0, batch: int = 1, length: int = 30) -> Tensor:
        generator = torch.Generator().manual_seed(100 + seed)
        return torch.randn(batch, length, HIDDEN, generator=generator)

    return get


@pytest.fixture(scope="session")
def make() -> Callable[..., nn.Module]:
    """`make_decoder`, for tests that change the model or need other options."""
    return make_decoder


def _generate(
    model: nn.Module,
    embeds: Tensor,
    *,
    steps: int = 3,
    mask: Tensor | None = None,
    cache: object = None,
    tokens: Tensor | None = None,
) -> list[Tensor]:
    """Logits [B, S, vocab] of a prefill, then [B, 1, vocab] of each decode step.

    `mask` [B, S] is 0 on left padding; `tokens` [B, steps] are fed back, default 5, 6, 7, ...
    """
    options: dict[str, object] = {}
    if mask is not None:
        options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    output = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, **options)
    logits = [output.logits]
    for step in range(steps):
        token = torch.full((len(embeds), 1), 5 + step) if tokens is None else tokens[:, [step]]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            options = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        output = model(
            input_ids=token, past_key_values=output.past_key_values, use_cache=True, **options
        )
        logits.append(output.logits)
    return logits


@pytest.fixture(scope="session")
def rollout() -> Callable[..., list[Tensor]]:
    """`_generate`: one prefill and some decode steps, by hand."""
    return _generate
