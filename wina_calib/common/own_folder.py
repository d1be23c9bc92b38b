"""Places of work that are one's own: no links, nobody else's, nothing that others may write into.

Hidden folders beside an output and the cache of compiled code lie at names that anybody can guess, perhaps in a folder that
others share. What is found there is used only where this user made it and nobody else could have changed it.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from wina_calib.errors import OutputError

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def problem_of(path: Path, kind: int = stat.S_IFDIR) -> str | None:
    """What keeps a file or folder that exists from being one's own, as the end of a sentence that begins with its name.

    Args:
        path: what is looked at; a link is not followed.
        kind: `stat.S_IFDIR` or `stat.S_IFREG`.

    Returns:
        None where it is one's own.

    Raises:
        OSError: it cannot be looked at.
    """
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return f"is a link (to {path.readlink()})"
    if stat.S_IFMT(status.st_mode) != kind:
        return "is no folder" if kind == stat.S_IFDIR else "is no regular file"
    if status.st_uid == os.geteuid() and not status.st_mode & _OTHERS:
        return None
    # Some file systems show one owner and one mode for everything, so that only what is new tells.
    owner, loose = _new_folder_in(path.parent)
    if status.st_uid != owner:
        return f"belongs to another user (number {status.st_uid})"
    return f"may be written by others (mode {stat.S_IMODE(status.st_mode):04o})" if not loose else None


def make_own(path: Path) -> None:
    """Make a folder that nobody else may enter, or find it as one's own.

    Raises:
        OutputError: what is there is not one's own.
        OSError: it cannot be made.
    """
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if (problem := problem_of(path)) is not None:
            raise _refusal(path, problem) from None


def refuse_foreign(path: Path) -> None:
    """Raise OutputError where a folder exists that is not one's own, or holds what is a link or somebody else's."""
    if not os.path.lexists(path):
        return
    if (problem := problem_of(path)) is not None:
        raise _refusal(path, problem)
    for place in (Path(top, name) for top, folders, files in os.walk(path) for name in (*folders, *files)):
        problem = problem_of(place, stat.S_IFDIR if stat.S_ISDIR(place.lstat().st_mode) else stat.S_IFREG)
        # Nobody else may enter here, so modes do not matter; links and owners tell what was put there.
        if problem is not None and not problem.startswith("may be written"):
            raise _refusal(place, problem)


def _refusal(place: Path, problem: str) -> OutputError:
    return OutputError(
        f"{place} {problem}: nothing is read from there or written to it. Remove it, or give another output."
    )


def remove(path: Path) -> None:
    """Remove what lies at a name of ours: a folder with all in it, a file, or a link, never what the link leads to.

    Raises:
        OutputError: it belongs to another user.
        OSError: it cannot be removed.
    """
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.is_dir():
        problem = problem_of(path)
        if problem is not None and problem.startswith("belongs"):
            raise OutputError(f"{path} {problem}, so it is not removed. Remove it, or give another output.")
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink(missing_ok=True)


def _new_folder_in(parent: Path) -> tuple[int, bool]:
    """Owner of a new folder, and whether others may write into it though they may not."""
    made = Path(tempfile.mkdtemp(prefix=".wina-", dir=parent))
    try:
        status = made.stat()
        return status.st_uid, bool(status.st_mode & _OTHERS)
    finally:
        with suppress(OSError):
            made.rmdir()
