"""Runs a piece of Python in a process of its own: another set of imports, another environment."""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from functools import cache
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


def forked(code: str, *args: object, folder: object = ".") -> subprocess.CompletedProcess[str]:
    """As `run`, in a fork of a process that has imported wina_calib already: for what is done there, not how it starts."""
    return imported().run(code, *args, folder=folder)


@cache
def imported() -> "Worker":
    """A process that has imported wina_calib, for jobs that go on beside each other."""
    worker = Worker({})
    atexit.register(worker.close)
    return worker


# What plain transformers says and raises for each of some classes: {class: text}.
PLAIN = """
import json, logging, sys, transformers

said = []
class Heard(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())

logging.getLogger("transformers").addHandler(Heard())
found = {}
for name in sys.argv[2:]:
    said.clear()
    try:
        getattr(transformers, name).from_pretrained(sys.argv[1])
        found[name] = ""
    except Exception as error:
        found[name] = "\\n".join([*said, str(error)])
print(json.dumps(found))
"""


def plain_errors(folder: object, *classes: str) -> dict[str, str]:
    """What transformers says where wina_calib is not imported and a class cannot load a folder; nothing where it can."""
    return run_json(PLAIN, folder, *classes, env={"TRANSFORMERS_VERBOSITY": "warning"})


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
import contextlib, importlib, importlib.util, io, json, os, signal, sys, traceback
import wina_calib, wina_calib.cli, wina_calib.checkpoint.hub
import transformers.models.llama.modeling_llama
if importlib.util.find_spec("matplotlib"):
    importlib.import_module("matplotlib.backends.backend_agg")
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a job's process; its answer ends with it
for line in sys.stdin:
    job = json.loads(line)
    answer = os.open(job["answer"], os.O_WRONLY)
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ.update(job["env"])
        os.chdir(job["folder"])
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
        with os.fdopen(answer, "w") as pipe:
            json.dump([status, out.getvalue(), err.getvalue()], pipe)
        os._exit(0)
    os.close(answer)
    print(child, flush=True)
"""


class Job:
    """A piece of Python that runs in a fork of a worker."""

    def __init__(self, process: int, answer: int, args: list[str]) -> None:
        self._process, self._answer, self._args = process, answer, args

    def wait(self) -> subprocess.CompletedProcess[str]:
        """What it printed and how it ended."""
        os.set_blocking(self._answer, True)
        with os.fdopen(self._answer) as pipe:
            status, out, err = json.loads(pipe.read())
        return subprocess.CompletedProcess(self._args, status, out, err)

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        os.kill(self._process, signal.SIGKILL)
        os.close(self._answer)


class Worker:
    """A process that has imported wina_calib in an environment, and runs each job in a fork of itself."""

    def __init__(self, env: dict[str, str]) -> None:
        self._answers = tempfile.TemporaryDirectory()
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(env),
            cwd=Path(__file__).parent,
        )

    def start(self, code: str, *args: object, env: dict[str, str] | None = None, folder: object = ".") -> Job:
        """Start a job; several run at the same time. `env` changes what is read when it is needed, such as HF_TOKEN."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._count += 1
        path = Path(self._answers.name) / str(self._count)
        os.mkfifo(path)
        answer = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        job = {"code": textwrap.dedent(code), "args": [*map(str, args)], "env": env or {}, "folder": str(folder)}
        print(json.dumps(job | {"answer": str(path)}), file=self._process.stdin, flush=True)
        return Job(int(self._process.stdout.readline()), answer, [*map(str, args)])

    def run(
        self, code: str, *args: object, env: dict[str, str] | None = None, folder: object = "."
    ) -> subprocess.CompletedProcess[str]:
        """Start a job and wait for it; as `run`."""
        return self.start(code, *args, env=env, folder=folder).wait()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._answers.cleanup()
