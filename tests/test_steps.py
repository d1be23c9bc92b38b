"""Decoding token by token masks what one pass over the same text masks, with every supported transformers."""

from pathlib import Path

import pytest
import tiny
import torch
from transformers import PreTrainedModel

import wina_calib
from wina_calib.errors import UsageError
from wina_calib.runtime.load import runtime_state

PROMPT = torch.randint(4, 300, (1, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(calibrated: Path) -> PreTrainedModel:
    return wina_calib.load(calibrated, 0.5)


def test_generate_drops_what_was_calibrated(model: PreTrainedModel) -> None:
    state = runtime_state(model)
    with state.counting() as counts:
        model.generate(PROMPT, max_new_tokens=40, min_new_tokens=40, do_sample=False, pad_token_id=3)
        seen, dropped = (sum(getattr(c, name) for c in counts.values()) for name in ("seen", "dropped"))
    assert 0.42 < dropped / seen < 0.55  # 51 tokens, of which the first is dense


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_steps_give_what_one_pass_gives(family: str, tmp_path: Path, text: Path) -> None:
    tiny.save(family, tmp_path / "model")
    tiny.calibrate(tmp_path / "model", tmp_path / "out", text, transform="none")
    model = wina_calib.load(tmp_path / "out", 0.5)
    tokens = model.generate(
        PROMPT, max_new_tokens=12, do_sample=False, pad_token_id=3, output_logits=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        whole = model(tokens.sequences, use_cache=False).logits[0, PROMPT.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.cat(tokens.logits), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_is_no_cache_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match="expected a cache of transformers"):
        model.model(PROMPT, **tiny.given([(PROMPT, PROMPT)]))
