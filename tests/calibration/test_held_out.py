"""The text that a calibration measures on is the beginning of what `evaluate` reads."""

import pytest
import tiny
import torch

from wina_calib.calibration import held_out
from wina_calib.corpus.sources import EVALUATED_TOKENS
from wina_calib.studies.evaluate import evaluation_blocks


@pytest.mark.parametrize("tokens", [2560, 12288, EVALUATED_TOKENS])
def test_it_is_the_beginning_of_what_evaluate_reads(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "EVALUATED_TOKENS", EVALUATED_TOKENS)
    tokenizer = tiny.tokenizer()
    mine = held_out.held_out_blocks(tokenizer, 512, tokens)
    whole = evaluation_blocks((), tokenizer, EVALUATED_TOKENS, 512)
    assert mine.ids.shape == (tokens // 512, 512)
    assert torch.equal(mine.ids, whole.ids[: len(mine.ids)])
    assert (mine.fingerprint == whole.fingerprint) is (tokens == EVALUATED_TOKENS)
