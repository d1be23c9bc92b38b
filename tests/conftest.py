"""Shared fixtures: one thread, no network, and models that are calibrated once a session."""

import fcntl
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import tiny
import torch
from transformers.utils import logging as transformers_logging

import wina_calib
from wina_calib.calibration import held_out
from wina_calib.common.own_cache import cache_folder

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
torch.set_num_threads(int(os.environ.get("WINA_TEST_THREADS", "1")))


def pytest_collection_finish() -> None:
    """What imports and collection have made stays; looking through it again and again takes seconds a minute."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where base models lie is remembered for one worker alone, and nowhere in the user's cache; kernels come from there."""
    kept = cache_folder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WINA_CALIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        own = cache_folder()
        for file in () if kept is None or own is None else kept.iterdir():
            if file.is_file() and not file.name.startswith("place-"):
                shutil.copy2(file, own)
        yield


@pytest.fixture(scope="session", autouse=True)
def held_out_text_is_short() -> Iterator[None]:
    """Random models are measured on a sixth of the text: what comes out says nothing of them anyway."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "HELD_OUT_TOKENS", held_out.HELD_OUT_TOKENS // 6)
        patch.setattr(held_out, "EVALUATED_TOKENS", held_out.HELD_OUT_TOKENS)
        yield


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
    """The bundled demo model, calibrated quickly on a little text; every worker has a copy of its own."""
    base = tmp_path_factory.getbasetemp()
    made = (base.parent if hasattr(request.config, "workerinput") else base) / "demo-sparse"
    with made.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not made.exists():
            options = {"samples": 24, "seq_len": 512, "sparsity": 0.5, "grid": (0.25, 0.5, 0.65)}
            wina_calib.calibrate("demo", made, quick=True, **options)
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("demo") / "sparse"))
