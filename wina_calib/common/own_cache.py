"""The folder in which what is compiled or measured on this machine is kept for later processes, checked before it is used.

It is `$WINA_CALIB_CACHE` or `~/.cache/wina_calib`, and in it a folder of this user's own, which nobody else may enter: the
cache itself may be shared. What is kept carries the SHA-256 of its bytes in its name, so that a file that was cut, changed or
only half written counts as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import stat
from functools import cache
from pathlib import Path

from wina_calib.common.own_folder import make_own, problem_of
from wina_calib.errors import OutputError

logger = logging.getLogger(__name__)
_MAX_KEPT = 64 << 20


def cache_folder() -> Path | None:
    """This user's own folder in the cache, made if need be; None where there is no home, or none can be one's own."""
    given = os.environ.get("WINA_CALIB_CACHE")
    try:
        shared = Path(given) if given else Path.home() / ".cache" / "wina_calib"
        shared.mkdir(mode=0o755, parents=True, exist_ok=True)
        mode = shared.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise OutputError(f"others may rename what is in {shared}. Take that right away, as `chmod o-w` does.")
        folder = shared / f"user-{os.geteuid()}"
        make_own(folder)
    except (OSError, RuntimeError) as error:  # not writable; no home is known
        logger.debug("no cache: %s", error)
        return None
    except OutputError as error:
        _warn(str(error))
        return None
    return folder


@cache
def _warn(reason: str) -> None:
    logger.warning("the cache is not used: %s", reason)


def read_own(path: Path, limit: int = _MAX_KEPT) -> bytes | None:
    """The bytes of a small regular file that nobody else could have written; None where there is no such file."""
    try:
        if problem_of(path, stat.S_IFREG) is not None:
            return None
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            return file.read() if os.fstat(descriptor).st_size <= limit else None
    except OSError:
        return None


def find_kept(folder: Path, name: str, suffix: str) -> Path | None:
    """The whole and unchanged file that was kept under a name; files of that name that are not are removed."""
    form = re.compile(rf"{re.escape(name)}-([0-9a-f]{{64}}){re.escape(suffix)}")
    for path in sorted(folder.glob(f"{name}-*{suffix}")):
        match = form.fullmatch(path.name)
        data = read_own(path)
        if match and data is not None and hashlib.sha256(data).hexdigest() == match[1]:
            return path
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def keep(made: Path, folder: Path, name: str, suffix: str) -> Path:
    """Move a file that was made inside of `folder` to where `find_kept` finds it; gives where it is then."""
    place = folder / f"{name}-{hashlib.sha256(made.read_bytes()).hexdigest()}{suffix}"
    made.chmod(0o600)
    made.replace(place)
    return place
