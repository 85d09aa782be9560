"""openpi's own PI0Pytorch, pruned without changing it. `make test-openpi` runs these."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

import vla_pruner as vp
from checks import fingerprint, near

if find_spec("openpi") is None or find_spec("openpi.models_pytorch") is None:
    pytest.skip("openpi is not installed; run `make test-openpi`", allow_module_level=True)

from tiny_openpi import WORDS, M, act, openpi, revision

KINDS = pytest.mark.parametrize("kind", ["pi0", "pi05"])


@pytest.fixture(scope="module")
def policies():
    made = {}

    def get(kind):
        if kind not in made:
            with pytest.MonkeyPatch.context() as patch, torch.no_grad():
                made[kind] = openpi(patch, kind)
        return made[kind]

    return get


@KINDS
def test_tokens_removed_equals_tokens_hidden(policies, kind, proves):
    """Three cameras; one row has a missing one and a padded prompt."""
    policy = policies(kind)
    act(policy, 0)
    before, found, reports = fingerprint(policy), {}, {}
    for mode in ("drop", "mask"):
        with vp.prune(policy, keep=0.25, layer=2, window=1, mode=mode) as session:
            found[mode] = torch.stack([act(policy, seed) for seed in (1, 2)])
        reports[mode] = session.last
    dropped, masked = reports["drop"], reports["mask"]
    assert dropped.views == (M, M, M) and dropped.visual_kept == 3 * M // 4
    assert dropped.tokens_full == 3 * M + WORDS
    assert torch.equal(dropped.kept_mask, masked.kept_mask)
    assert not dropped.kept_mask[1, 2 * M :].any()
    assert float(dropped.action.sum()) > 0
    near(found["drop"], found["mask"])
    full = torch.stack([act(policy, seed) for seed in (1, 2)])
    assert torch.equal(full[0], found["drop"][0])  # the warm-up step
    assert (full[1] - found["drop"][1]).abs().max() > 1e-3
    assert fingerprint(policy) == before
    checks = ("reference", "undo", "batch", "padding", "cameras", "missing", "dynamic")
    proves("pi0-policies", type(policy), *checks, openpi=revision())


@KINDS
def test_keeping_everything_changes_nothing(policies, kind, proves):
    policy = policies(kind)
    expected = act(policy, 1)
    with vp.prune(policy, keep=1.0, window=1):
        found = [act(policy, 1) for _ in range(2)]
    assert all(torch.equal(one, expected) for one in found)
    proves("pi0-policies", type(policy), "keep=1.0", openpi=revision())
