"""`vla-pruner bench`: what it compares, what it reports, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vla_pruner.cli import main
from vla_pruner.commands.bench import _grid
from vla_pruner.commands.shared.options import keep_of
from vla_pruner.measure.comparison import FULL, compare, steps_to_prepare
from vla_pruner.measure.timing import PassClock
from vla_pruner.measure.workloads import build_workload
from vla_pruner.methods import build
from vla_pruner.pruning.flops import prefill_flops, pruned_prefill_flops

CPU = torch.device("cpu")
SIZES = {"layers": 6, "hidden": 32, "ffn": 64}


def workload(folder: Path):
    return build_workload(str(folder), layers=None, vision=True, dtype=None, device=CPU)


def test_copies_share_weights_but_not_hooks(oft_folder: Path) -> None:
    job = workload(oft_folder)
    copy = job.copy()
    assert copy is not job.policy
    for (name, ours), theirs in zip(job.policy.named_parameters(), copy.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr(), name
    job.decoder(copy).register_forward_pre_hook(lambda *_: pytest.fail("hook of the copy"))
    job.step(job.policy)


def test_what_is_timed_of_a_captured_step_is_all_of_it(oft_folder: Path) -> None:
    result = compare(workload(oft_folder), [], repeats=1)
    assert "prefill ms" in _grid(result)[0]
    captured = replace(result, settings={**result.settings, "captured": "inductor"})
    assert "step ms" in _grid(captured)[0] and "prefill ms" not in _grid(captured)[0]


@pytest.mark.parametrize("kind", ["oft_folder", "openvla_folder", "pi0_folder"])
def test_compare_reports_each_variant_against_the_full_model(
    kind: str, request: pytest.FixtureRequest
) -> None:
    job = workload(request.getfixturevalue(kind))
    methods = [build(name, keep=keep) for name in ("vla-pruner", "fastv") for keep in (0.5, 4)]
    ticks = []
    result = compare(job, methods, repeats=3, tick=lambda: ticks.append(1))

    names = [FULL, "vla-pruner 0.5", "vla-pruner 4", "fastv 0.5", "fastv 4"]
    assert [row.name for row in result.rows] == names
    prepared = sum(steps_to_prepare(method, False) for method in [None, *methods])
    assert len(ticks) == prepared + 3 * len(names)

    full, half, four = result.rows[:3]
    visual = job.visual
    assert (full.tokens, full.visual, full.bound) == (job.tokens, visual, 1.0)
    assert full.of_bound == 1.0 == full.speedup.median
    assert (half.visual, four.visual) == (visual // 2, 4)
    assert four.tokens == job.tokens - visual + 4
    expected = prefill_flops(job.tokens, **SIZES) / pruned_prefill_flops(
        job.tokens, visual, 4, cut_layer=3, **SIZES
    )
    assert four.bound == pytest.approx(expected)
    for row in result.rows:
        assert row.prefill_ms.count == 3
        assert row.total_ms.median >= row.prefill_ms.median > 0
        assert (row.decode_ms is not None) == (kind != "oft_folder")
        assert row.of_bound == pytest.approx(row.speedup.median / row.bound)
        measured = row.scoring_ms is not None and row.selection_ms is not None
        assert measured == (row.name != FULL)


def test_the_length_of_the_prefill_is_what_the_decoder_sees(
    oft_folder: Path, openvla_folder: Path, pi0_folder: Path
) -> None:
    for folder in (oft_folder, openvla_folder, pi0_folder):
        job, seen = workload(folder), []
        job.decoder(job.policy).register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: (
                seen.append(kwargs["inputs_embeds"].shape[1])
                if kwargs.get("inputs_embeds") is not None
                else None
            ),
            with_kwargs=True,
        )
        job.step(job.policy)
        assert seen[0] == job.tokens


def test_published_sizes_have_the_sequences_of_libero(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, tokens, visual in (("openvla-7b", 291, 256), ("openvla-oft-7b", 603, 512)):
        job = build_workload(name, layers=1, vision=False, dtype=None, device=torch.device("meta"))
        assert (job.tokens, job.visual) == (tokens, visual)
        assert job.policy.language_model.config.hidden_size == 4096
        assert job.policy.dtype == torch.bfloat16
    for name, tokens in (("pi0", 768 + 48), ("pi05", 768 + 200)):
        job = build_workload(name, layers=2, vision=False, dtype=None, device=torch.device("meta"))
        assert (job.tokens, job.visual) == (tokens, 768)
        assert [len(stack.layers) for stack in job.stacks(job.policy)] == [2, 2]
        assert job.policy.language_model.config.hidden_size == 2048


def test_the_flow_steps_of_pi0_are_its_decoding(pi0_folder: Path) -> None:
    """The first pass is the prefix's, each flow step one of the expert's."""
    job = workload(pi0_folder)
    clock = PassClock(job.stacks(job.policy), CPU)
    job.step(job.policy)
    assert len(clock.take()) == 1 + job.policy.config.flow_steps


def test_the_command_prints_a_table_and_writes_json_and_markdown(
    oft_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [str(tmp_path / "new" / name) for name in ("bench.json", "bench.md")]
    argv = ["bench", "--model", str(oft_folder), "--methods", "fastv", "--keep", "0.5,8"]
    assert main([*argv, "--repeats", "2", "--out", out[0], "--out", out[1]]) == 0
    assert "interleaved rounds" in " ".join(capsys.readouterr().out.split())

    values = json.loads(Path(out[0]).read_text())
    full, half, eight, ideal, ideal_of_eight = values["rows"]
    assert [row["name"] for row in (full, half, eight)] == ["full", "fastv 0.5", "fastv 8"]
    assert ideal_of_eight["name"] == "ideal 8 K=3" and eight["visual"] == 8
    # The ideal cuts as the method does, and does less.
    for one, best in ((half, ideal), (eight, ideal_of_eight)):
        assert (one["tokens"], one["flops"]) == (best["tokens"], best["flops"])
        assert best["scoring_ms"] is None and best["of_ideal"]["median"] == 1.0
        assert one["of_ideal"]["median"] > 0
        assert full["operators"] < best["operators"] < one["operators"]
        assert one["operators_by_part"]["scoring"] > best["operators_by_part"].get("scoring", 0)
        assert one["waits"] == {} == full["waits"]
    assert values["environment"]["torch"] == torch.__version__
    assert values["settings"]["repeats"] == 2
    assert set(values["selection_128_of_512_ms"]) == {"bfloat16", "float32"}
    table = Path(out[1]).read_text()
    assert "| fastv 8 | 8 |" in table
    assert "Greedy search" in table


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--repeats", "0"], "at least one round"),
        (["--keep", "half"], "use fractions"),
        (["--keep", "1.5"], "keep"),
        (["--methods", "fastvv"], "did you mean 'fastv'"),
        (["--methods", ","], "--methods is empty"),
        (["--out", "table.csv"], ".json or .md"),
        (["--threads", "0"], "at least one thread"),
        (["--device", "toaster"], "use cpu"),
        (["--model", "no-such-policy"], "no-such-policy"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *argv]) == 2
    assert complaint in capsys.readouterr().err


def test_checkpoints_keep_their_size(oft_folder: Path) -> None:
    with pytest.raises(ValueError, match="comes with its own size"):
        build_workload(str(oft_folder), layers=2, vision=True, dtype=None, device=CPU)


def test_a_method_that_never_cuts_is_measured_once(oft_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    argv = ["bench", "--model", str(oft_folder), "--methods", "none,random", "--keep", "0.5,0.25"]
    assert main([*argv, "--repeats", "1", "--out", str(out)]) == 0
    names = [row["name"] for row in json.loads(out.read_text())["rows"]]
    assert names[:4] == ["full", "none", "random 0.5", "random 0.25"]
    assert [name.split()[0] for name in names[4:]] == ["ideal", "ideal"]


def test_keep_takes_fractions_and_counts() -> None:
    assert keep_of("0.25") == 0.25
    assert keep_of("64") == 64
    assert isinstance(keep_of("1"), int)
    assert isinstance(keep_of("1.0"), float)


@pytest.mark.gpu
def test_bench_on_a_gpu_eager_and_compiled(oft_folder: Path, tmp_path: Path) -> None:
    for extra in ([], ["--compile"]):
        out = tmp_path / "gpu.json"
        argv = ["bench", "--model", str(oft_folder), "--device", "cuda", "--repeats", "3"]
        assert main([*argv, "--keep", "0.25", "--out", str(out), *extra]) == 0
        values = json.loads(out.read_text())
        assert values["environment"]["gpu"]
        assert all(row["memory_mb"] > 0 for row in values["rows"])


def test_a_method_with_several_cuts_and_keys_of_the_last_step(openvla_folder: Path) -> None:
    """The same image at every step: what is reused costs no projection, but every key is seen."""
    job = workload(openvla_folder)
    row = compare(job, [build("vla-cache", keep=0.5)], repeats=1).rows[1]
    assert row.name == "vla-cache 0.5" and row.visual < job.visual
    least = pruned_prefill_flops(job.tokens, job.visual, row.visual, cut_layer=1, **SIZES)
    assert least < row.flops < prefill_flops(job.tokens, **SIZES)


def test_a_variant_that_does_not_fit_is_named_before_anything_is_measured(
    oft_folder: Path,
) -> None:
    job = replace(workload(oft_folder), step=lambda *_: pytest.fail("a step was made"))
    for method, message in (
        (build("fastv", keep=9999), r"fastv 9999: keeping 9999 tokens asks for more than the"),
        (build("fastv", layer=77), r"fastv 0.25: .*decoder has 6"),
        (build("fitprune", keep=0.5), r"fitprune 0.5: .*needs a calibration recipe"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(job, [build("fastv"), build("random"), method][1:], repeats=1)
    with pytest.raises(ValueError, match=r"two variants are called 'random 0\.25'"):
        compare(job, [build("random"), build("random", seed=1)], repeats=1)
