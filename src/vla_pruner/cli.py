"""The command line: finds the command that was asked for, runs it, turns errors into sentences.

A command is a module with `add_arguments(parser)` and `run(args) -> exit code`. Only the module of
the chosen command is imported, so that `--help` and `--version` answer at once, without torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import vla_pruner
from vla_pruner._short import cut, printable

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# Which extra brings a package that a command may find missing.
EXTRA_OF = {
    "robosuite": "sim",
    "mujoco": "sim",
    "cv2": "sim",
    "scipy": "sim",  # comes with robosuite
    "termcolor": "sim",
    "imageio": "sim",
    "imageio_ffmpeg": "sim",
    "triton": "gpu",
    "ray": "ray",
    "pyarrow": "parquet",
    "wandb": "wandb",
    "trackio": "trackio",
    "rerun": "rerun",
    "vla_eval": "serve",
    "anyio": "serve",
    "jsonargparse": "serve",
    "websockets": "doors",
    "msgpack": "doors",
    "h11": "doors",
    "zmq": "doors",
    "grpc": "doors",
    "libero": "libero",
    "bddl": "libero",
    "gymnasium": "libero",
    "h5py": "libero",
    "easydict": "libero",
    "cloudpickle": "libero",
    "future": "libero",
    "av": "tune",
    "gguf": "smol",
}

AddArguments = Callable[[argparse.ArgumentParser], None]
LONGEST = 8000
"""Characters of an error's sentence, whatever it quotes."""

Run = Callable[[argparse.Namespace], "int | None"]


@dataclass(frozen=True)
class Command:
    """One word after `vla-pruner`: a line for the list, a paragraph for its own help, its code."""

    summary: str
    description: str
    load: Callable[[], tuple[AddArguments, Run]]


def _file(name: str) -> Callable[[], tuple[AddArguments, Run]]:
    """Loads a module of `vla_pruner.commands`, which is called like the word."""

    def load() -> tuple[AddArguments, Run]:
        module = importlib.import_module(f"vla_pruner.commands.{name}")
        return module.add_arguments, module.run

    return load


COMMANDS = {
    "demo": Command(
        "watch a small policy work in a simulator, with all and with few of its visual tokens",
        "Runs the same pick-and-place episodes with all visual tokens and with a pruned model, "
        "prints success, speed and cost side by side, and writes a page with videos that show "
        "which image patches were dropped.",
        _file("demo"),
    ),
    "methods": Command(
        "list the pruning methods, or the options of one",
        "Lists what `method=` of vp.prune and `--method` understand. With NAME: its options.",
        _file("methods"),
    ),
    "models": Command(
        "list the model families that can be pruned, and what was tested on each",
        "Lists the model families that vp.prune recognises, and what the tests showed of each "
        "class: on the real one, or on a double where that cannot be installed. Any other Hugging "
        "Face decoder can be pruned with vp.models.Decoder: see docs/adding-a-model.md.",
        _file("models"),
    ),
    "analyze": Command(
        "draw what a policy looks at, and what each method would have kept of it",
        "Runs episodes on all visual tokens, shows the same images to each method, and writes a "
        "page with overlaps of attention, errors of its forecasts, agreement of the methods, and "
        "films of what they keep; the numbers also as CSV.",
        _file("analyze"),
    ),
    "bench": Command(
        "measure time, memory and FLOPs of pruned models against the full one, side by side",
        "Runs the full model and each pruned one in turn, again and again, in one process, and "
        "reports medians with quartiles. With the dimensions of a published model it builds that "
        "model with random weights: time does not depend on what the weights are.",
        _file("bench"),
    ),
    "eval": Command(
        "success and cost of a policy in a suite, with all or with few of its visual tokens",
        "Runs the held-out scenes of a suite and keeps one row per episode in OUT/episodes.sqlite. "
        "Run again with the same folder, it continues; other methods may be added to it, and "
        "`vla-pruner report` compares them scene by scene.",
        _file("runs.eval"),
    ),
    "sweep": Command(
        "eval for a matrix: policies x methods x ratios x suites",
        "Runs every cell that a YAML file describes, each scene under all conditions before the "
        "next one, and resumes where it stopped.",
        _file("runs.sweep"),
    ),
    "latency": Command(
        "time the conditions of a run apart, on recorded observations",
        "Records what each policy of a run sees, replays it through every condition in turn, and "
        "keeps latency and memory beside the episodes; `vla-pruner report` then shows these.",
        _file("runs.latency"),
    ),
    "report": Command(
        "tables from what eval and sweep have run",
        "Success per suite with intervals, relative accuracy, FLOPs, latency and speed-up, paired "
        "differences with exact tests, success per task.",
        _file("runs.report"),
    ),
    "watch": Command(
        "films of episodes that a run has finished",
        "Plays episodes of a run again and writes a page for each scene: what the policy saw, "
        "which visual tokens it kept, the scores that chose them, and its actions, on a time line. "
        "`vla-pruner report` then opens these films from its squares.",
        _file("runs.watch"),
    ),
    "calibrate": Command(
        "search the settings of a method on recorded observations, for one model",
        "FitPrune, VTW and the layer reduction of EfficientVLA follow a recipe: a small file that "
        "says how many visual tokens each layer sees, where all of them leave, or which layers "
        "matter. This command makes it from what a policy sees, and the recipe is refused for any "
        "other model. Use it with vp.prune(model, METHOD, recipe=FILE).",
        _file("calibrate"),
    ),
    "tune": Command(
        "which budget is safe, from recorded observations, without a simulator",
        "Replays recorded episodes on all visual tokens and under every method and budget, says "
        "how far the actions are apart and how long a call takes, and recommends the cheapest "
        "budget within a tolerance. The receipt that it writes is read by `vla-pruner serve` and "
        "`vla-pruner doctor`. See docs/tune.md.",
        _file("tune"),
    ),
    "doctor": Command(
        "check that a model sees its images and can be pruned faithfully",
        "Loads a policy and looks for the faults that cost others days: an image that never "
        "reaches the language model, another attention kernel when pruned, visual tokens at "
        "other positions than expected. Exit code 1 if something is wrong.",
        _file("doctor"),
    ),
    "serve": Command(
        "answer robots and evaluation harnesses with a pruned policy",
        "Loads a policy, attaches a pruning method, and answers clients of vla-eval, openpi, "
        "OpenVLA's /act, GR00T or lerobot until Ctrl-C or SIGTERM, several protocols at once. "
        "Every episode has its own history, also where several clients share a pass of the model. "
        "See docs/serve/README.md and docs/serving.md.",
        _file("serve"),
    ),
    "realtime": Command(
        "a simulated arm that does not wait for its policy, with all and with few visual tokens",
        "PickPlace ticks by the clock on the wall behind our client, the policy answers from a "
        "server in a process of its own, and what comes too late is not waited for. Success, time "
        "stood still, age of actions, late answers and motion. See docs/realtime.md.",
        _file("realtime"),
    ),
}


# -- parsing and errors --------------------------------------------------------------------------


class _Help(argparse.HelpFormatter):
    """Names a default where there is one that the help does not say, as it would be typed."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said, default = action.help or "", action.default
        nothing = default is None or default is False or default in ("", [], argparse.SUPPRESS)
        if nothing or action.required or "default" in said:
            return said
        typed = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{said} (default: {typed.replace(chr(37), chr(37) * 2)})"


def _plain(sentence: str) -> str:
    """A sentence for a terminal: short, and without what names may hold of its commands."""
    return "\n".join(printable(line) for line in cut(sentence, LONGEST).split("\n"))


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in a sentence of bounded length, whatever was typed."""

    def error(self, message: str) -> NoReturn:
        super().error(_plain(message))


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser of `vla-pruner`; only the command called `chosen` gets its own arguments."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show the Python traceback of an error",
    )
    parser: argparse.ArgumentParser = _Parser(
        "vla-pruner",
        description="Drops the visual tokens that a vision-language-action policy does not need, "
        "and measures what that buys and costs.",
        epilog="More about a command: vla-pruner COMMAND --help",
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {vla_pruner.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.summary,
            description=command.description,
            parents=[common],
            formatter_class=_Help,
        )
        if name == chosen:
            add_arguments, run = command.load()
            add_arguments(sub)
            sub.set_defaults(run=run)
    return parser


_OF_THE_SYSTEM = {
    FileExistsError: "is in the way; name a folder that can be made",
    NotADirectoryError: "leads through a file; name a folder",
    IsADirectoryError: "is a folder; name a file",
    FileNotFoundError: "does not exist",
    PermissionError: "may not be read or written by this user; name another, or change its rights",
}


def _sentence(error: OSError) -> str:
    """What the operating system said of a file."""
    name = cut(os.fsdecode(error.filename) if _path(error.filename) else str(error.filename), 400)
    for kind, what in _OF_THE_SYSTEM.items():
        if isinstance(error, kind):
            return f"{name} {what}"
    return f"{name}: {error.strerror or type(error).__name__}"


def _path(name: object) -> bool:
    return isinstance(name, (str, bytes, os.PathLike))


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and sentence for an exception that ended a command."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in EXTRA_OF:
        package = str(error.name).split(".")[0]
        extra = EXTRA_OF[package]
        return FAILED, (
            f"this command needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'vla-pruner[{extra}]'"
        )
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        bad = isinstance(error, tuple(_OF_THE_SYSTEM))
        return BAD_INPUT if bad else FAILED, _sentence(error)
    if isinstance(error, (ValueError, FileNotFoundError, NotADirectoryError, FileExistsError)):
        return BAD_INPUT, str(error)
    if isinstance(error, (RuntimeError, OSError, ImportError)):
        return FAILED, str(error) or type(error).__name__
    return FAILED, f"{type(error).__name__}: {error} (run again with --debug to see where)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vla-pruner` with these arguments (default: those of the process).

    Returns the exit code: 0 done, 1 failed, 2 bad input, 130 interrupted with Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    chosen = next((word for word in argv if not word.startswith("-")), None)
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {_plain(str(message))}\n"
    try:
        parser = build_parser(chosen)
        args = parser.parse_args(argv)
        if args.command is None:
            parser.print_help(sys.stderr)
            return BAD_INPUT
        return int(args.run(args) or OK)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader (`| head`) went away; keep the exit from flushing to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, sentence = explain(error)
        print(f"error: {_plain(sentence)}", file=sys.stderr)
        return code
    finally:
        warnings.formatwarning = before


if __name__ == "__main__":
    sys.exit(main())
