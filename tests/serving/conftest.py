"""Tiny policies and model servers that serve them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "models" / "openvla"))

from tiny_openvla import make_oft, make_openvla

if TYPE_CHECKING:
    from vla_pruner.serving.server import PolicyServer


@pytest.fixture(scope="session")
def oft() -> Any:
    """A policy with two cameras, a state, and chunks of four actions."""
    return make_oft(num_images=2, proprio_dim=8)


@pytest.fixture(scope="session")
def openvla() -> Any:
    """A policy with one camera that writes one action."""
    return make_openvla()


@pytest.fixture
def open_server(oft: Any) -> Iterator[Callable[..., PolicyServer]]:
    """Makes a `PolicyServer`, of `oft` unless said otherwise; detached when the test is over."""
    from vla_pruner.serving.server import PolicyServer

    opened: list[PolicyServer] = []

    def make(policy: Any = None, **options: Any) -> PolicyServer:
        settings = {"keep": 0.25, "unnorm_key": "pick_place", "chunk_size": 1} | options
        opened.append(PolicyServer(policy or oft, **settings))
        return opened[-1]

    yield make
    for server in opened:
        server.served.close()
