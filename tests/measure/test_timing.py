"""The stopwatch: quartiles, interleaving, passes of a decoder, memory, recorded calls."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from vla_pruner.measure import timing
from vla_pruner.measure.environment import commit, cpu_name, stamp, version_of
from vla_pruner.measure.timing import PassClock, Spread

CPU = torch.device("cpu")


def test_spread_is_median_and_quartiles_whatever_the_order() -> None:
    samples = [7.0, 1.0, 3.0, 100.0, 5.0]
    spread = Spread.of(samples)
    expected = np.percentile(samples, [25, 50, 75])
    assert (spread.lower, spread.median, spread.upper) == pytest.approx(tuple(expected))
    assert spread.count == 5


def test_spread_of_one_sample_is_that_sample_and_of_none_is_refused() -> None:
    assert Spread.of([2.5]) == Spread(2.5, 2.5, 2.5, 1)
    with pytest.raises(ValueError, match="at least one sample"):
        Spread.of([])


def test_variants_take_turns() -> None:
    assert list(timing.in_turn(["a", "b"], 3)) == ["a", "b", "a", "b", "a", "b"]


class Slow(nn.Module):
    def forward(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds


def test_pass_clock_times_each_pass_with_the_hooks_inside_and_leaves_no_trace() -> None:
    module = Slow()
    module.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    clock = PassClock([module], CPU)
    module(0.0)
    module(0.03)
    first, second = clock.take()
    assert 20 <= first < 50 <= second
    assert clock.take() == []

    clock.remove()
    module(0.0)
    assert clock.take() == []


def test_time_is_in_milliseconds() -> None:
    assert 20 <= timing.time_ms(lambda: time.sleep(0.02), CPU) < 200


def test_peak_memory_counts_what_was_held_and_freed_again() -> None:
    def hold_64_mb() -> None:
        torch.ones(16 * 2**20).sum()

    peak = timing.peak_memory_mb(hold_64_mb, CPU)
    if peak is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert 50 < peak < 200


def test_stamp_names_versions_and_machine() -> None:
    values = stamp("cpu")
    assert values["torch"] == torch.__version__
    assert values["cpu"] == cpu_name() != ""
    assert values["threads"] == torch.get_num_threads()
    assert values["gpu"] is None
    assert version_of("a-package-that-nobody-has-written") is None
    assert commit() is None or len(commit().rstrip("+")) == 12


KEPT = """
import resource, torch
from vla_pruner.measure.timing import keep_freed_memory, peak_memory_mb

def fetch():
    for piece in [torch.empty(5 << 20) for _ in range(4)]:
        piece.fill_(1.0)

def faults():
    fetch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        fetch()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
print(keep_freed_memory(), before, faults(), peak_memory_mb(fetch, torch.device("cpu")))
"""


def test_freed_memory_is_not_fetched_again_and_still_counts_as_a_peak() -> None:
    found = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    kept, before, after, peak_mb = found.stdout.split()
    if kept == "False":
        pytest.skip("the C library is not glibc")
    assert 10 * int(after) < int(before)
    assert peak_mb == "None" or 75 < float(peak_mb) < 160
