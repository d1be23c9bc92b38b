"""Runs a piece of Python in a process of its own: another set of imports, another environment."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

TIMEOUT = 240


def run(code: str, *args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run code with arguments; the result has returncode, stdout and stderr."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environment(env),
        cwd=Path(__file__).parent,
    )


def run_json(code: str, *args: object, env: dict[str, str] | None = None) -> Any:
    """Run code whose last line of output is JSON, and return that; a failing process fails the test."""
    done = run(code, *args, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a quiet process on one thread, with `extra` on top."""
    base = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return base | (extra or {})
