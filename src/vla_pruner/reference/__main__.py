"""Command line of the reference task: demonstrations, training, export."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .libero.suites import FRAME_STRIDE, SUITES, TASKS

WEIGHTS = Path(__file__).parent / "weights"
POLICIES = ("mini-openvla", "mini-oft", "mini-pi0", "mini-oft-libero", "smol-oft")


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vla_pruner.reference", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    demos = commands.add_parser("demos", help="record demonstrations of the scripted expert")
    demos.add_argument("--out", type=Path, required=True, help="folder for the episodes")
    demos.add_argument(
        "--suite", choices=SUITES, help="a suite of LIBERO, instead of the pick-and-place task"
    )
    demos.add_argument("--tasks", type=_numbers, help="with --suite: such as 0,3; default: all ten")
    demos.add_argument("--stride", type=int, help="with --suite: steps from image to image (4)")
    demos.add_argument(
        "--episodes", type=int, help="default: 2500; with --suite 50, of each of its tasks"
    )
    demos.add_argument("--seed0", type=int, default=0, help="seed of the first episode")
    demos.add_argument("--workers", type=int, default=2, help="processes")
    demos.add_argument(
        "--policy", help="a policy that acts first in every episode, before the expert takes over"
    )
    demos.set_defaults(run=_demos)

    expert = commands.add_parser("expert", help="success of the scripted expert in LIBERO")
    expert.add_argument("--suite", choices=SUITES, required=True)
    expert.add_argument("--tasks", type=_numbers, help="such as 0,3; default: all ten")
    expert.add_argument(
        "--states", type=_numbers, default=[10, 20, 30], help="official initial states of each task"
    )
    expert.set_defaults(run=_expert)

    train = commands.add_parser("train", help="train one stage; run again to continue")
    train.add_argument("stage", choices=("vision", "smol-vision", *POLICIES))
    train.add_argument("--data", type=Path, required=True, help="folder with demonstrations")
    train.add_argument("--out", type=Path, required=True, help="folder for checkpoints and logs")
    train.add_argument("--minutes", type=float, default=60.0, help="length of the stage")
    train.add_argument("--steps", type=int, help="length in optimiser steps instead")
    train.add_argument("--batch", type=int, default=16)
    train.add_argument("--learning-rate", type=float, default=2e-3, help="its largest value")
    train.add_argument("--grid", type=int, help="patches along one side of an image (10; smol 16)")
    train.add_argument("--pool", type=int, help="smol-oft: average so many x so many visual tokens")
    train.add_argument(
        "--lora-rate", type=float, help="smol-oft: LoRA's learning rate over the rest's"
    )
    train.add_argument(
        "--tower-rate", type=float, help="smol-oft: the towers' (default 0.3; 0: they stay)"
    )
    train.add_argument("--shift", type=float, help="largest random shift of images, px (default 4)")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--start", type=Path, help="checkpoint or policy folder to begin from")
    train.add_argument("--device", default="cpu", help="cpu or cuda")
    train.set_defaults(run=_train)

    export = commands.add_parser("export", help="write a trained stage as a policy folder")
    export.add_argument("stage", choices=POLICIES)
    export.add_argument("--checkpoints", type=Path, required=True, help="the --out of train")
    export.add_argument("--out", type=Path, help="default: the weights that the package ships")
    export.set_defaults(run=_export)

    watch = commands.add_parser("observations", help="recorded LIBERO episodes, to calibrate on")
    watch.add_argument("--data", type=Path, required=True, help="the --out of demos --suite")
    watch.add_argument("--out", type=Path, required=True)
    watch.add_argument("--seed", type=int, default=0, help="which episode of each task")
    watch.set_defaults(run=_observations)

    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _demos(options: argparse.Namespace) -> None:
    if options.suite is None:
        from .demonstrations import record

        if options.tasks is not None or options.stride is not None:
            raise ValueError("--tasks and --stride go with --suite.")
        episodes = options.episodes or 2500
        kept = record(options.out, episodes, options.seed0, options.workers, options.policy)
    else:
        from .libero import demonstrations as libero

        kept = libero.record(
            options.out,
            options.suite,
            options.episodes or 50,
            tasks=options.tasks or range(TASKS),
            seed0=options.seed0,
            workers=options.workers,
            stride=options.stride or FRAME_STRIDE,
            policy=options.policy,
        )
    print(f"{kept} episodes in {options.out}")


def _expert(options: argparse.Namespace) -> None:
    from .libero.expert import measure

    solved = measure(options.suite, options.tasks or range(TASKS), options.states)
    total = [steps for task in solved.values() for steps in task]
    print(f"{options.suite}: {sum(steps > 0 for steps in total)} of {len(total)}")


def _train(options: argparse.Namespace) -> None:
    from .dataset import Demonstrations
    from .flow import FlowTrainer
    from .libero.dataset import LiberoDemonstrations
    from .smol import STAGES as SMOL_STAGES
    from .smol import SmolSettings, SmolTrainer
    from .training import Settings, Trainer

    names: tuple[str, ...] = (
        "stage",
        "minutes",
        "steps",
        "batch",
        "learning_rate",
        "grid",
        "shift",
        "seed",
        "device",
    )
    smol = options.stage in SMOL_STAGES
    names += ("pool", "lora_rate", "tower_rate") if smol else ()
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    settings = SmolSettings(**given) if smol else Settings(**given)
    source = LiberoDemonstrations if settings.stage == "mini-oft-libero" else Demonstrations
    data = source(options.data, pixels=(10 if smol else 14) * settings.grid)
    print(f"reading the demonstrations in {options.data} ...", flush=True)
    print(f"{data.refresh()} episodes, {len(data)} steps", flush=True)
    trainer = {"mini-pi0": FlowTrainer, **dict.fromkeys(SMOL_STAGES, SmolTrainer)}
    trainer.get(settings.stage, Trainer)(settings, data, options.out, options.start).run()


def _export(options: argparse.Namespace) -> None:
    if options.stage == "mini-pi0":
        from .flow import export
    elif options.stage == "smol-oft":
        from .smol import export
    else:
        from .training import export

    folder = options.out or WEIGHTS / options.stage
    export(options.checkpoints / f"{options.stage}.pt", folder)
    print(f"wrote {folder}")


def _observations(options: argparse.Namespace) -> None:
    from .libero.observations import write_observations

    tasks = write_observations(options.data, options.out, seed=options.seed)
    print(f"{tasks} tasks in {options.out}")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
