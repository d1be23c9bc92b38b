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


WORKER = """
import contextlib, io, json, os, sys, traceback
import wina_calib, wina_calib.cli, wina_calib.hub
for line in sys.stdin:
    job = json.loads(line)
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read)
        os.environ.update(job["env"])
        sys.argv = ["-c", *job["args"]]
        out, err, status = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                exec(compile(job["code"], "job", "exec"), {"__name__": "__main__"})
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                traceback.print_exc()
                status = 1
        with os.fdopen(write, "w") as pipe:
            json.dump([status, out.getvalue(), err.getvalue()], pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    print(answer, flush=True)
"""


class Worker:
    """A process that has imported wina_calib in an environment, and runs each job in a fork of itself."""

    def __init__(self, env: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(env),
            cwd=Path(__file__).parent,
        )

    def run(self, code: str, *args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """As `run`; `env` changes what is read when it is needed, such as HF_TOKEN."""
        assert self._process.stdin is not None and self._process.stdout is not None
        job = {"code": textwrap.dedent(code), "args": [*map(str, args)], "env": env or {}}
        print(json.dumps(job), file=self._process.stdin, flush=True)
        status, out, err = json.loads(self._process.stdout.readline())
        return subprocess.CompletedProcess(job["args"], status, out, err)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
