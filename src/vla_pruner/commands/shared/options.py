"""Arguments that several commands take, each defined once, and how their values are read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from vla_pruner._arguments import a_path, at_least
from vla_pruner._short import short, word
from vla_pruner.episodes.condition import ALL_TOKENS, Condition
from vla_pruner.episodes.control import Gripper
from vla_pruner.models.loading import shipped
from vla_pruner.scenes.suites import PICK_PLACE, SUITES

Parser = argparse.ArgumentParser


# -- adding them ---------------------------------------------------------------------------------


def add_policy(parser: Parser, default: str = "mini-oft") -> None:
    """`--policy`: who acts."""
    parser.add_argument(
        "--policy",
        default=default,
        help=f"a policy that ships here ({', '.join(shipped())}), a folder, or a hub id",
    )


def add_method(parser: Parser, default: str | None) -> None:
    """`--method`: one way of pruning."""
    parser.add_argument(
        "--method", default=default, help="a name, see `vla-pruner methods`, or MODULE:CLASS"
    )


def add_methods(parser: Parser, default: Sequence[str]) -> None:
    """`--methods`: several ways of pruning."""
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(default),
        help="names (`vla-pruner methods`) or MODULE:CLASS, apart by spaces or commas",
    )


def add_keep(parser: Parser) -> None:
    """`--keep`: one budget."""
    parser.add_argument(
        "--keep", help="how many visual tokens stay: a fraction such as 0.25, or a number"
    )


def add_keeps(parser: Parser, default: Sequence[str]) -> None:
    """`--keep`: several budgets."""
    parser.add_argument(
        "--keep",
        nargs="+",
        default=list(default),
        help="how many visual tokens stay: fractions such as 0.25, or numbers such as 50, apart by "
        "spaces or commas",
    )


def add_suite(parser: Parser) -> None:
    """`--suite`: where the policy acts."""
    parser.add_argument(
        "--suite", default=PICK_PLACE, help=f"{', '.join(SUITES)}, or MODULE:FUNCTION"
    )


def add_scenes(parser: Parser, episodes: int) -> None:
    """`--episodes` and `--seed`: which of the held-out scenes."""
    parser.add_argument(
        "--episodes", type=at_least(1), default=episodes, help="scenes, each run in every way"
    )
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        help="number of the first scene, among the held-out ones",
    )


def add_device(parser: Parser) -> None:
    """`--device`: where policies run."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N: where policies run")


def add_capture(parser: Parser) -> None:
    """`--capture`: whole steps are compiled."""
    parser.add_argument(
        "--capture",
        nargs="?",
        const="inductor",
        default="",
        metavar="BACKEND",
        help="compile whole steps (on a GPU, into CUDA graphs); the first calls of each kind take "
        "up to minutes. BACKEND is one of torch.compile, inductor where none is named",
    )


def add_control(parser: Parser) -> None:
    """`--execute`, `--gripper` and `--unnorm-key`: how the policy is driven."""
    parser.add_argument(
        "--execute",
        type=at_least(1),
        help="actions of a chunk to carry out before the policy is asked; default: what its "
        "config.json says, else 2",
    )
    parser.add_argument(
        "--gripper",
        choices=get_args(Gripper),
        help="how the policy writes it: robosuite (+1 close, -1 open) or rlds (0 close, 1 open; "
        "published checkpoints); default: what its config.json or the range of its statistics "
        "says, else robosuite",
    )
    add_unnorm_key(parser)


def add_unnorm_key(parser: Parser) -> None:
    """`--unnorm-key`: which statistics scale the actions."""
    parser.add_argument(
        "--unnorm-key", help="dataset whose statistics scale actions, if the policy has several"
    )


def add_out(parser: Parser, default: str | None, what: str) -> None:
    """`--out`: where the result goes; required without a default."""
    parser.add_argument(
        "--out",
        type=a_path,
        default=None if default is None else Path(default),
        required=default is None,
        help=what,
    )


def add_resume(parser: Parser) -> None:
    """`--resume`: go on with what is in `--out`."""
    parser.add_argument(
        "--resume", action="store_true", help="continue the episodes that are in --out already"
    )


_COMMA = r",(?![^()\[\]]*[)\]])"
"""Outside of brackets: an option may be a list, such as `:action_layers=(15,16)`."""


# -- reading them --------------------------------------------------------------------------------


def words_of(option: str, given: str | Sequence[str]) -> list[str]:
    """The words of a list, apart by spaces or commas, each once.

    Raises:
        ValueError: there is none, or one is there twice.
    """
    parts = given.split() if isinstance(given, str) else given
    words = [word for part in parts for word in re.split(_COMMA, part) if word]
    if not words:
        raise ValueError(f"{option} is empty; name at least one")
    if len(set(words)) < len(words):
        raise ValueError(f"{option} {' '.join(words)}: something is there twice")
    return words


def conditions_of(option: str, given: str | Sequence[str]) -> list[Condition]:
    """Conditions from a list of words. Errors: ValueError, one is unknown, or there twice."""
    words = words_of(option, given)
    found = [Condition.parse(word) for word in words]
    if len({condition.name for condition in found}) < len(found):
        raise ValueError(f"{option} {' '.join(words)}: need different conditions")
    return found


def keep_of(word: str) -> float | int:
    """A budget as it is written on the command line: a fraction in (0, 1], or a number."""
    try:
        keep = Condition.parse(f"random@{word}").keep
    except ValueError as error:
        raise ValueError(
            f"--keep {word}: use fractions such as 0.25, or numbers of tokens such as 64 ({error})"
        ) from None
    assert keep is not None
    return keep


def condition_of(method: str, keep: str | None, options: Sequence[str] = ()) -> Condition:
    """What `--method`, `--keep` and `--option` say together.

    Raises:
        ValueError: one is there and another missing, or names nothing.
    """
    if method == ALL_TOKENS and (keep is not None or options):
        raise ValueError("--keep and --option: say with --method what prunes, too")
    if method != ALL_TOKENS and keep is None:
        Condition.parse(f"{method}@1.0")  # Raises: no such method.
        raise ValueError(
            f"--method {word(method)}: say with --keep how many visual tokens stay, such as 0.25"
        )
    kept = "" if keep is None else "@" + ":".join([keep, *options])
    return Condition.parse(method + kept)


def device_of(name: str) -> torch.device:
    """A device that is there.

    Raises:
        ValueError: torch does not know it, or sees none.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {name}: torch {torch.__version__} sees no CUDA device here; use --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0"
        )
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: use cpu, cuda or cuda:N")
    return device


def check_capture(backend: str) -> None:
    """Refuse a backend that `torch.compile` does not have. Errors: ValueError."""
    if backend and backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise ValueError(f"--capture {word(backend)}: there are {', '.join(sorted(known))}")


def pick(name: str, known: dict[str, Any], kind: str) -> Any:
    """The one called `name`.

    Raises:
        ValueError: there is none; the message lists what there is.
    """
    if name not in known:
        raise ValueError(f"no {kind} is called {short(name)}; there are: {', '.join(known)}")
    return known[name]


def control_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_control` says, as `Control.of` takes it."""
    return {
        "captured": args.capture,
        "execute": args.execute,
        "gripper": args.gripper,
        "unnorm_key": args.unnorm_key,
    }
