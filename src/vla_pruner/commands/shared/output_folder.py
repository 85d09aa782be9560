"""The folder that a page is written to: made room for, or continued."""

from __future__ import annotations

import shutil
from pathlib import Path


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
