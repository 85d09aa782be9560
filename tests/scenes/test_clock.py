"""Time that goes on while a policy computes: delays, names of clocks, files of latencies."""

import json

import pytest

from vla_pruner.scenes.clock import EVERY, Clock, Latency, read_clock, read_latencies


@pytest.mark.parametrize(
    ("ms", "hz", "ticks"),
    [(0, 20, 0), (1, 20, 1), (50, 20, 1), (50.1, 20, 2), (200, 5, 1), (600, 5, 3), (601, 5, 4)],
)
def test_actions_come_at_the_first_tick_after_the_call(ms, hz, ticks):
    clock = Clock(hz, (Latency(EVERY, ms, ms),))
    assert clock.delay("none", warm_up=False, measured_ms=1e6) == ticks
    assert Clock(hz).delay("none", warm_up=False, measured_ms=ms) == ticks


def test_names_of_clocks():
    assert read_clock("live", 5) == Clock(5)
    assert read_clock("live20", 5) == Clock(20)
    assert read_clock("live:ahead", 5) == Clock(5, None, "ahead")
    given = (Latency(EVERY, 200, 200),)
    assert read_clock("live10:200ms", 5) == Clock(10, given)
    assert read_clock("live:200ms:rtc", 5) == Clock(5, given, "rtc")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("live0", "more than 0"),
        ("live1.2.3", "no number"),
        ("live5:1.2.3ms", "write a number"),
        ("live5:200ms:fast", "use wait, ahead"),
        ("lively", "write live"),
        ("live5::", "write live"),
    ],
)
def test_a_clock_that_is_not_understood_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_clock(text, 5)


def test_latencies_of_a_report_and_of_json(tmp_path):
    table = tmp_path / "report.csv"
    columns = [f"replayed.{which}.latency_ms" for which in ("every", "warm_up", "pruned")]
    table.write_text(
        "\n".join([",".join(["name", *columns]), "none,300,,", "fastv@0.5,210,,210", "x@0.5,,,"])
    )
    named = tmp_path / "latencies.json"
    named.write_text(json.dumps({"none": 300, "vla-pruner@0.25": {"warm_up": 310, "pruned": 180}}))
    clock = Clock(10, read_latencies(table))
    assert clock.delay("none", warm_up=False, measured_ms=1) == 3
    assert clock.delay("fastv@0.5", warm_up=False, measured_ms=1) == 3
    clock = read_clock(f"live10:{named}", 5)
    assert clock.delay("vla-pruner@0.25", warm_up=True, measured_ms=1) == 4
    assert clock.delay("vla-pruner@0.25", warm_up=False, measured_ms=1) == 2
    with pytest.raises(ValueError, match=r"say nothing of sparsevlm@0\.5, only of none"):
        clock.delay("sparsevlm@0.5", warm_up=False, measured_ms=1)
    assert Clock.from_dict(json.loads(json.dumps(_plain(clock)))) == clock


def _plain(clock: Clock) -> dict:
    from dataclasses import asdict

    return asdict(clock)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,success\nnone,1\n", "time the run first"),
        ("name,replayed.every.latency_ms\nnone,30\nnone,40\n", "several latencies of none"),
        ("name,replayed.every.latency_ms\nnone,fast\n", "no latencies of conditions"),
    ],
)
def test_a_file_without_latencies_is_refused(tmp_path, text, message):
    file = tmp_path / "report.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_latencies(file)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_latencies(tmp_path / "nothing.csv")


def test_negative_latencies_are_refused():
    with pytest.raises(ValueError, match="0 or more"):
        Clock(5, (Latency("none", 1, -1),))
