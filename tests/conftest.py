"""Shared fixtures: one thread, no network, and models that are calibrated once a session."""

import fcntl
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import tiny
import torch
from transformers.utils import logging as transformers_logging

import wina_calib

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
torch.set_num_threads(int(os.environ.get("WINA_TEST_THREADS", "1")))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file that is long enough to calibrate tiny models on."""
    return tiny.text_file(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama folder."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    tiny.save("llama", folder)
    return folder


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Path:
    """The tiny Llama, calibrated without a transform."""
    folder = tmp_path_factory.mktemp("calibrated") / "sparse"
    tiny.calibrate(llama, folder, text, transform="none", samples=80)
    return folder


@pytest.fixture(scope="session")
def demo_sparse(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The bundled demo model, calibrated on a little text with the default options; every worker has a copy of its own."""
    base = tmp_path_factory.getbasetemp()
    made = (base.parent if hasattr(request.config, "workerinput") else base) / "demo-sparse"
    with made.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not made.exists():
            wina_calib.calibrate("demo", made, samples=32, seq_len=512, sparsity=0.5, grid=(0.25, 0.5, 0.65))
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("demo") / "sparse"))
