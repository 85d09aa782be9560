"""Command line of the reference task: demonstrations, training, export, evaluation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vla_pruner.reference", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    demos = commands.add_parser("demos", help="record demonstrations of the scripted expert")
    demos.add_argument("--out", type=Path, required=True, help="folder for the episodes")
    demos.add_argument("--episodes", type=int, default=2500)
    demos.add_argument("--seed0", type=int, default=0, help="seed of the first episode")
    demos.add_argument("--workers", type=int, default=2, help="processes")
    demos.add_argument(
        "--policy", help="a policy that acts first in every episode, before the expert takes over"
    )
    demos.set_defaults(run=_demos)

    train = commands.add_parser("train", help="train one stage; run again to continue")
    train.add_argument("stage", choices=("vision", "mini-openvla", "mini-oft", "mini-pi0"))
    train.add_argument("--data", type=Path, required=True, help="folder with demonstrations")
    train.add_argument("--out", type=Path, required=True, help="folder for checkpoints and logs")
    train.add_argument("--minutes", type=float, default=60.0, help="length of the stage")
    train.add_argument("--steps", type=int, help="length in optimiser steps instead")
    train.add_argument("--batch", type=int, default=16)
    train.add_argument("--learning-rate", type=float, default=2e-3, help="its largest value")
    train.add_argument("--grid", type=int, default=10, help="patches along one side of an image")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--start", type=Path, help="checkpoint or policy folder to begin from")
    train.add_argument("--device", default="cpu", help="cpu or cuda")
    train.set_defaults(run=_train)

    export = commands.add_parser("export", help="write a trained stage as a policy folder")
    export.add_argument("stage", choices=("mini-openvla", "mini-oft", "mini-pi0"))
    export.add_argument("--checkpoints", type=Path, required=True, help="the --out of train")
    export.add_argument("--out", type=Path, help="default: the weights that the package ships")
    export.set_defaults(run=_export)

    evaluate = commands.add_parser("evaluate", help="success and cost over held-out scenes")
    evaluate.add_argument("--policy", required=True, help="a policy that ships here, or a folder")
    evaluate.add_argument(
        "--conditions",
        default="none,vla-pruner@0.5,vla-pruner@0.25",
        help="comma-separated, such as none,vla-pruner@0.25,vla-pruner@0.25:window=1,fastv@64",
    )
    evaluate.add_argument("--episodes", type=int, default=100, help="scenes per condition")
    evaluate.add_argument("--out", type=Path, required=True, help="folder for the results")
    evaluate.add_argument("--workers", type=int, default=2, help="processes")
    evaluate.set_defaults(run=_evaluate)

    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _demos(options: argparse.Namespace) -> None:
    from .demonstrations import record

    kept = record(options.out, options.episodes, options.seed0, options.workers, options.policy)
    print(f"{kept} episodes in {options.out}")


def _train(options: argparse.Namespace) -> None:
    from .dataset import Demonstrations
    from .flow import FlowTrainer
    from .training import Settings, Trainer

    names = ("stage", "minutes", "steps", "batch", "learning_rate", "grid", "seed", "device")
    settings = Settings(**{name: getattr(options, name) for name in names})
    data = Demonstrations(options.data, pixels=14 * settings.grid)
    print(f"reading the demonstrations in {options.data} ...", flush=True)
    print(f"{data.refresh()} episodes, {len(data)} steps", flush=True)
    kind = FlowTrainer if settings.stage == "mini-pi0" else Trainer
    kind(settings, data, options.out, options.start).run()


def _export(options: argparse.Namespace) -> None:
    if options.stage == "mini-pi0":
        from .flow import export
    else:
        from .training import export

    folder = options.out or WEIGHTS / options.stage
    export(options.checkpoints / f"{options.stage}.pt", folder)
    print(f"wrote {folder}")


def _evaluate(options: argparse.Namespace) -> None:
    from ..evaluation.rollouts import evaluate

    evaluate(
        options.policy,
        conditions=options.conditions.split(","),
        episodes=options.episodes,
        out=options.out,
        workers=options.workers,
    )
    print((options.out / "summary.md").read_text())


if __name__ == "__main__":
    sys.exit(main())
