"""Decoding that drops far from what was asked for is said once, and looked at no more than a few steps."""

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import wina_calib
from wina_calib.runtime.fast_path.blocks import Short
from wina_calib.runtime.first_tokens import Rows
from wina_calib.runtime.load import runtime_state, sparse_sites
from wina_calib.runtime.watch import STEPS, Watch, is_far

PROMPT = torch.randint(4, 300, (1, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(calibrated: Path) -> PreTrainedModel:
    return wina_calib.load(calibrated, 0.5)


def said(model: PreTrainedModel, caplog: pytest.LogCaptureFixture, **more: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="wina_calib"):
        for _ in range(2):
            kwargs = {"max_new_tokens": STEPS + 4, "do_sample": False, "pad_token_id": 3, "eos_token_id": -1}
            model.generate(PROMPT, **(kwargs | more))
    return [record.message for record in caplog.records if "decoding drops" in record.message]


def test_what_was_asked_for_is_not_spoken_of(model: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    watch = runtime_state(model).watch
    assert said(model, caplog) == []
    assert watch is not None
    assert watch._seen == 0.0 < watch._asked
    assert runtime_state(model).watch is None


@pytest.mark.parametrize("short", [True, False])
def test_thresholds_that_are_far_off(
    short: bool, model: PreTrainedModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not short:
        monkeypatch.setattr(Short, "_rows", lambda self, x: None)
    for site in sparse_sites(model):
        site.shared.threshold.mul_(1e-3)
    (message,) = said(model, caplog)
    assert "decoding drops 0% of the inputs where 50% were asked for" in message


def test_steps_that_are_taken_for_prompts(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a transformers that hands on its cache in a way that is not seen."""
    monkeypatch.setattr(Rows, "first", lambda self: torch.ones(self.tokens.shape[:2], dtype=torch.bool))
    assert len(said(model, caplog)) == 1
    assert said(model, caplog) == []


@pytest.mark.parametrize("quiet", ["sparsity 0", "densely", "prompts alone"])
def test_what_is_not_looked_at(quiet: str, model: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    if quiet == "sparsity 0":
        wina_calib.set_sparsity(model, 0.0)
        assert said(model, caplog) == []
    elif quiet == "densely":
        with runtime_state(model).densely():
            assert said(model, caplog) == []
    else:
        with torch.no_grad():
            for _ in range(STEPS):
                model(PROMPT)
    watch = runtime_state(model).watch
    assert watch is None or watch._asked == 0.0 or watch._left == STEPS


def test_results_are_the_same_while_it_looks(model: PreTrainedModel) -> None:
    found = []
    for watch in (Watch(), None, Watch()):
        runtime_state(model).watch = watch
        kwargs = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        found.append(torch.cat(model.generate(PROMPT, pad_token_id=3, **kwargs).logits))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[1])


def test_copies_look_for_themselves() -> None:
    watch = Watch()
    watch.note(0.5, 64, None, 1)
    for other in (copy.deepcopy(watch), pickle.loads(pickle.dumps(watch))):
        assert other._seen == 0.0


@pytest.mark.parametrize(
    ("found", "asked", "far"),
    [
        (0.45, 0.5, False),
        (0.38, 0.5, False),
        (0.37, 0.5, True),
        (0.63, 0.5, True),
        (0.12, 0.2, False),
        (0.09, 0.2, True),
    ],
)
def test_how_far_is_far(found: float, asked: float, far: bool) -> None:
    assert is_far(found, asked) == far
