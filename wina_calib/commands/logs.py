"""What is said while a command works: log levels that are given back, and libraries that are loaded when they are needed."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import click

INTERRUPTED = "Interrupted; nothing was left behind."


@contextmanager
def log_level(name: str, level: int) -> Iterator[None]:
    """Hold a logger at a level, and give it back: a program that calls a command keeps its own."""
    logger = logging.getLogger(name)
    old = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(old)


def load_libraries() -> None:
    """Load torch and transformers, which takes seconds: a command's first act, once its options are known to be right.

    transformers then knows the checkpoint format, and says as much as `--verbose` and `--quiet` ask for.
    """
    context = click.get_current_context(silent=True)
    asked = context.find_root().params if context is not None else {}
    with _ends_at_once():
        hf = importlib.import_module("transformers.utils.logging")
        for name in ("quantizer", "model_types"):  # which register themselves
            importlib.import_module(f"wina_calib.runtime.{name}")
    (hf.set_verbosity_info if asked.get("verbose") else hf.set_verbosity_error)()
    hf.disable_progress_bar()
    if asked.get("quiet"):
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()


@contextmanager
def _ends_at_once() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the program: an exception amid an import is lost in some libraries, and misread in others."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        os.write(2, f"{INTERRUPTED}\n".encode())
        os._exit(130)

    before = {each: signal.signal(each, end) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
