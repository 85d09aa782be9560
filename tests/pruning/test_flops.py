"""Prefill costs are those that the paper prints."""

import pytest

from vla_pruner.pruning.flops import (
    layer_macs,
    layered_prefill_flops,
    prefill_flops,
    pruned_prefill_flops,
)

OPENVLA = {"layers": 32, "hidden": 4096, "ffn": 11008}


def test_openvla_costs_what_table_1_prints():
    assert prefill_flops(291, **OPENVLA) / 1e12 == pytest.approx(1.9067, abs=5e-5)


@pytest.mark.parametrize(
    ("kept", "ratio", "printed"), [(128, 59.9, 59.76), (64, 40.0, 39.77), (32, 30.1, 29.96)]
)
def test_openvla_pruned_costs_what_table_1_prints(kept, ratio, printed):
    pruned = pruned_prefill_flops(291, 256, kept, cut_layer=3, **OPENVLA)
    percent = 100 * pruned / prefill_flops(291, **OPENVLA)
    assert percent == pytest.approx(ratio, abs=0.05)
    assert percent == pytest.approx(printed, abs=0.25)


def test_the_equation_as_written_has_a_smaller_network():
    assert prefill_flops(291, convention="paper", **OPENVLA) / 1e12 == pytest.approx(
        1.487, abs=1e-3
    )
    n, d, m = 7, 16, 40
    gated = layer_macs(n, hidden=d, ffn=m)
    assert gated == 4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m
    assert gated - layer_macs(n, hidden=d, ffn=m, convention="paper") == n * d * m


def test_the_limits_of_pruning():
    full = prefill_flops(50, layers=8, hidden=32, ffn=64)
    sizes = {"layers": 8, "hidden": 32, "ffn": 64}
    assert pruned_prefill_flops(50, 40, 40, cut_layer=3, **sizes) == full
    assert pruned_prefill_flops(50, 40, 0, cut_layer=8, **sizes) == full
    assert pruned_prefill_flops(50, 40, 10, cut_layer=0, **sizes) == prefill_flops(20, **sizes)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((50, 60, 10), {"cut_layer": 3}, "kept <= visual <= tokens"),
        ((50, 40, 41), {"cut_layer": 3}, "kept=41"),
        ((50, 40, 10), {"cut_layer": 9}, "cut_layer=9"),
        ((50, 50, 0), {"cut_layer": 3}, "at least 1"),
        ((50, 40, 10), {"cut_layer": 3, "convention": "macs"}, "convention='macs'"),
    ],
)
def test_contradictions_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        pruned_prefill_flops(*arguments, layers=8, hidden=32, ffn=64, **options)


def test_a_decoder_without_layers_is_refused():
    with pytest.raises(ValueError, match="layers=0"):
        prefill_flops(50, layers=0, hidden=32, ffn=64)


def test_layers_of_different_length_are_summed():
    d, m, lengths = 16, 40, [9, 9, 5, 0, 2]
    expected = sum(4 * n * d**2 + 2 * n * n * d + 3 * n * d * m for n in lengths)
    assert layered_prefill_flops(lengths, hidden=d, ffn=m) == expected
    one_cut = pruned_prefill_flops(50, 40, 10, cut_layer=3, layers=8, hidden=d, ffn=m)
    assert layered_prefill_flops([50] * 3 + [20] * 5, hidden=d, ffn=m) == one_cut


def test_keys_of_earlier_steps_cost_attention_alone():
    d, m = 16, 40
    expected = 4 * 3 * d**2 + 2 * 3 * 8 * d + 2 * 3 * d * m
    got = layered_prefill_flops([3], keys_per_layer=[8], hidden=d, ffn=m, convention="paper")
    assert got == expected


@pytest.mark.parametrize(
    ("lengths", "keys", "message"),
    [([-1], None, "got -1"), ([4], [3], "got 4 and 3"), ([4, 4], [4], "2 layers, but keys of 1")],
)
def test_impossible_lengths_are_refused(lengths, keys, message):
    with pytest.raises(ValueError, match=message):
        layered_prefill_flops(lengths, keys_per_layer=keys, hidden=8, ffn=8)
