"""An output folder that appears whole or not at all.

Work goes to a hidden sibling, `.NAME.partial` or, in a calibration, `.NAME.state/output`, and one rename makes it NAME. With
overwrite the old folder is first moved to `.NAME.old`; should the process die between the two renames, the next start moves
it back. A lock file keeps two processes apart. These names can be guessed, so what lies there is used only where it is one's own.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wina_calib.common.own_folder import problem_of, remove
from wina_calib.common.printable import checked_name
from wina_calib.errors import OutputError

_STAGED = ".wina-staged"
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def output_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to write to that becomes `target` when the block ends, and vanishes when it raises.

    Raises:
        OutputError: the folder exists, is locked by another process, cannot be written, or the disk is full.
    """
    with claimed(target, overwrite=overwrite) as place:
        partial = place.with_name(f".{place.name}.partial")
        mode = _make_anew(partial)
        try:
            yield partial
            with suppress(PermissionError):  # on a file system without modes
                partial.chmod(mode)
            publish(partial, place)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _make_anew(folder: Path) -> int:
    """Make an empty folder that nobody else may enter, whatever lies at its name; gives the mode of any new folder."""
    remove(folder)
    folder.mkdir()
    mode = stat.S_IMODE(folder.lstat().st_mode)
    with suppress(PermissionError):
        folder.chmod(0o700)
    return mode


@contextmanager
def claimed(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Keep other processes from making the folder `target` for the length of the context; gives its full path.

    Raises:
        OutputError: as for `output_folder`.
    """
    target = target.expanduser().resolve()
    with readable_errors(target), lock(target):
        _recover(target, _old(target))
        if target.exists() and not overwrite:
            raise _exists(target)
        yield target


def _exists(target: Path, more: str = "") -> OutputError:
    return OutputError(
        f"{target} exists{more}. Give another folder, or --overwrite (Python: overwrite=True) to replace it."
    )


def clear_leftovers(target: Path) -> bool:
    """Remove what a process that died has left beside the folder `target`; whether there was anything.

    A finished calibration's state is `run.py`'s to remove, as it may be gone on with.
    """
    places = [_old(target), target.with_name(f".{target.name}.partial")]
    if not any(map(os.path.lexists, (*places, _lock_file(target)))):
        return False
    with readable_errors(target), lock(target):
        _recover(target, _old(target))
        remove(places[1])
    return True


def publish(folder: Path, target: Path) -> None:
    """Make a finished folder on the same disk the claimed `target`, in the place of what is there."""
    old = _old(target)
    sync_tree(folder)
    try:
        if target.exists():
            target.rename(old)
        folder.rename(target)
        sync_folder(target.parent)
    except BaseException:
        _recover(target, old)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def check_output(target: Path, *, overwrite: bool, keep: Path | None = None, made: tuple[str, ...] = ()) -> None:
    """Refuse early, before any work, what `output_folder` would refuse, and what must not be replaced.

    Args:
        target: the folder to make.
        overwrite: replace an existing folder.
        keep: a folder that the work reads; it must not be replaced.
        made: files of which a folder must have one to be replaced: nothing else is ever deleted.

    Raises:
        OutputError: with the reason and the remedy.
    """
    with readable_errors(target):
        target = target.expanduser().resolve()
        _check_target(target, overwrite, keep, made)


def _check_target(target: Path, overwrite: bool, keep: Path | None, made: tuple[str, ...]) -> None:
    checked_name(str(target))
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file. Give a folder.")
    if target.exists() and not overwrite:
        died = os.access(target.parent, os.W_OK | os.X_OK) and clear_leftovers(target)
        raise _exists(target, "; what a stopped run had left beside it is removed" if died else "")
    if keep is not None and (keep.resolve() == target or target in keep.resolve().parents):
        raise OutputError(f"{target} holds what is read from. Give another folder.")
    if target.exists() and any(target.iterdir()) and made and not any((target / name).exists() for name in made):
        raise OutputError(
            f"{target} was not made by this command, so it is not replaced. Remove it, or give another folder."
        )
    if os.path.ismount(target):
        raise OutputError(f"{target} is a mount point. Give a folder inside it.")
    if not target.parent.is_dir():
        raise OutputError(f"{target.parent} does not exist. Create it, or give another folder.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target.parent} is not writable. Give another folder, or change its permissions.")


@contextmanager
def readable_errors(target: Path, *, every: bool = False) -> Iterator[None]:
    """Turn the operating system's errors into one clear message about `target`: those of a writer, or `every` one."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{target}: the disk is full. Free space, or write to another disk.") from error
        if error.errno == errno.EFBIG:
            raise OutputError(
                f"{target}: a file of it is larger than the disk or `ulimit -f` allows. Write elsewhere, or raise the limit."
            ) from error
        if error.errno in _UNWRITABLE or (every and error.errno):
            raise OutputError(f"{target} cannot be written ({error.strerror}). Give another folder.") from error
        if error.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EBUSY):
            raise OutputError(f"{target}: {error.strerror}. Give another folder.") from error
        raise


def write_file(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all, and force it to disk. A link at its name is replaced, never written through.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    with readable_errors(path, every=True):
        remove(temporary)
        try:
            with temporary.open("xb") as file:  # a new file: what others may have put at the name is no way out
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """Give an empty folder; when the block ends, its files replace those of `folder`, all of them or none.

    The files are finished in a hidden folder inside `folder`, and renaming that one is the moment of change: should the
    process die after it, `finish_staged` does the rest.

    Raises:
        OutputError: another process is at it, the folder cannot be written, or the disk is full.
    """
    partial, staged = folder / f"{_STAGED}.partial", folder / _STAGED
    with readable_errors(folder), lock(folder.absolute()):
        finish_staged(folder)
        _make_anew(partial)
        try:
            yield partial
            sync_tree(partial)
            partial.rename(staged)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(folder)
        finish_staged(folder)


def finish_staged(folder: Path) -> None:
    """Finish what a process that died inside `staged_files` had decided; else do nothing."""
    staged = folder / _STAGED
    if not os.path.lexists(staged):
        return
    with readable_errors(folder):
        if (problem := problem_of(staged)) is not None:
            raise OutputError(f"{staged} {problem}, so nothing is taken from it. Remove it.")
        for path in sorted(staged.iterdir()):
            # Another process may be finishing too: what it has moved is done.
            with suppress(FileNotFoundError):
                if not stat.S_ISREG(path.lstat().st_mode):
                    raise OutputError(f"{path} is no regular file, so it is not taken. Remove {staged}.")
                path.replace(folder / path.name)
        sync_folder(folder)
        with suppress(FileNotFoundError):
            staged.rmdir()


def sync_tree(folder: Path) -> None:
    """Force all files of a folder to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_file(path)
    sync_folder(folder)


def sync_file(path: Path, kind: int = 0) -> None:
    """Force a file's bytes to disk."""
    descriptor = os.open(path, os.O_RDONLY | kind)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk."""
    sync_file(folder, os.O_DIRECTORY)


def _recover(target: Path, old: Path) -> None:
    """Undo an overwrite that died between its two renames, or finish one that died after them."""
    if old.is_dir() and not old.is_symlink() and not os.path.lexists(target):
        problem = problem_of(old)
        if problem is not None and problem.startswith("belongs"):
            raise OutputError(f"{old} {problem}, so it does not become {target}. Remove it, or give another folder.")
        old.rename(target)
    else:
        remove(old)


def _lock_file(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


@contextmanager
def lock(target: Path) -> Iterator[None]:
    """Keep other processes from writing `target` for the length of the context.

    Raises:
        OutputError: another process is at it, or what lies at the lock's name is no lock.
    """
    path = _lock_file(target)
    # Without following a link, or waiting for who would open the other end of a pipe.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise OutputError(f"{path} is no lock file. Remove it, or give another output.") from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OutputError(f"{path} is no lock file. Remove it, or give another output.")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"another process is writing {target}. Wait for it, or give another folder.") from error
        if not path.exists() or os.fstat(descriptor).st_ino != path.stat().st_ino:
            raise OutputError(f"another process has just written {target}. Start again.")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
