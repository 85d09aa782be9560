"""Where a command writes to, made sure of before the work: room for a page, a file's folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vla_pruner._short import word


def check_folder(folder: Path, option: str = "--out") -> None:
    """Make sure that a folder can be made and written into; it is not made yet.

    Raises:
        ValueError: a file is in its way, or this user may not write there.
    """
    at = folder.absolute()
    while not at.exists() and at != at.parent:
        at = at.parent
    if not at.is_dir():
        raise ValueError(f"{option} {word(str(folder))}: {at.name} is a file; name a folder")
    if not os.access(at, os.W_OK):
        raise ValueError(
            f"{option} {word(str(folder))}: {at} may not be written to by this user; name another "
            "folder, or change its rights"
        )


def check_file(file: Path, option: str = "--out") -> None:
    """The same for the folder of a file.

    Raises:
        ValueError: as above, or the name is a folder's.
    """
    if file.is_dir():
        raise ValueError(f"{option} {word(str(file))} is a folder; name a file")
    check_folder(file.parent, option)
    if file.exists() and not os.access(file, os.W_OK):
        raise ValueError(f"{option} {word(str(file))} may not be written to by this user")


def prepare_folder(out: Path, mark: str, what: str, *, resume: bool) -> None:
    """Make room for a new page, or make sure that there is one to continue.

    An earlier one is set aside as `NAME.previous`.

    Args:
        out: the folder.
        mark: a file that every folder of this kind has.
        what: the kind, for messages.
        resume: whether to continue.

    Raises:
        ValueError: `out` is a file, holds something else, or there is nothing to resume.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if resume:
        if not (out / mark).exists():
            raise ValueError(f"--resume: there is nothing to continue in {out}; leave it out")
        return
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / mark).exists():
        raise ValueError(f"--out {out} holds something that is no {what}; name another folder")
    previous = out.with_name(out.name + ".previous")
    if previous.exists():
        if not (previous / mark).exists():
            raise ValueError(f"{previous} is in the way; remove it or name another folder")
        shutil.rmtree(previous)
    out.rename(previous)
