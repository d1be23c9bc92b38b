"""What the hub of the tests stores."""

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True)
class File:
    """A file of a commit: its bytes, and whether it came as a large file."""

    data: bytes
    large: bool

    @property
    def git_oid(self) -> str:
        """Name of the git blob: of the pointer, where the file is large."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        blob = text.encode() if self.large else self.data
        return hashlib.sha1(f"blob {len(blob)}\0".encode() + blob).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """What a client compares with its own file."""
        return self.sha256 if self.large else self.git_oid


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    sha: str
    files: dict[str, File]
    message: str


@dataclass
class Repo:
    """A model repository: branch name to its commits in order."""

    owner: str
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def at(self, revision: str | None) -> Commit | None:
        """The commit of a branch, or of a hash."""
        commits = self.branches.get(revision or "main")
        if commits:
            return commits[-1]
        return next((c for branch in self.branches.values() for c in branch if c.sha == revision), None)


class Refused(Exception):
    """Becomes an error answer."""

    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(message or code)
        self.status, self.code = status, code
