"""Losses, labels and divergences are those of whole logits, however the vocabulary is cut."""

from pathlib import Path

import pytest
import tiny
import torch
from stream_cases import open_stream, some_ids

from wina_calib.calibration.layer_stream import LayerStream, head_rows
from wina_calib.calibration.likelihood import loss_gradients, measured_rises, next_token_nll
from wina_calib.storage.hidden_states import HiddenStates


@pytest.fixture(params=["whole", "in parts"], autouse=True)
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows of lm_head at a time: all, or parts of which the last is shorter."""
    if request.param == "in parts":
        monkeypatch.setattr("wina_calib.calibration.layer_stream._PART_ROWS", 97)
    return 97 if request.param == "in parts" else 1 << 16


def states(stream: LayerStream, seed: int) -> HiddenStates:
    """Random last hidden states."""
    found, generator = stream.store(), torch.Generator().manual_seed(seed)
    for i, ids in enumerate(stream.batches):
        found[i] = torch.randn(*ids.shape, 64, generator=generator)
    return found


def whole_logits(model: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return model.lm_head(model.model.norm(hidden)).float()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_loss_and_its_gradient_on_text(family: str, rows: int, tmp_path: Path) -> None:
    model = tiny.save(family, tmp_path / "m")
    model.requires_grad_(False)
    stream = open_stream(tmp_path / "m", some_ids())
    assert (head_rows(stream.source.architecture, stream.dtype) == 97) == (rows == 97)
    hidden, ids = states(stream, 0), torch.cat(stream.batches)
    leaf = torch.cat([hidden[i] for i in stream.mine]).requires_grad_()
    logits = whole_logits(model, leaf)
    if family == "gemma2":  # which bounds its logits
        limit = model.config.final_logit_softcapping
        logits = (logits / limit).tanh() * limit
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(next_token_nll(stream, hidden).flatten(), loss.detach(), rtol=1e-5, atol=1e-5)
    loss.sum().backward()
    found = loss_gradients(stream, hidden, seed=0)[1]
    torch.testing.assert_close(torch.cat([found[i] for i in stream.mine]), leaf.grad, rtol=1e-4, atol=1e-6)


def test_labels_are_drawn_from_the_model(tmp_path: Path) -> None:
    model = tiny.make("llama")
    model.requires_grad_(False).lm_head.weight.mul_(15)  # so that some tokens are far likelier than others
    model.save_pretrained(tmp_path / "m")
    stream = open_stream(tmp_path / "m", some_ids(40, 100), micro_batch=40)
    one = torch.randn(64, generator=torch.Generator().manual_seed(3))
    hidden = stream.store()
    hidden[0] = one.expand(40, 100, 64).clone()
    # The mean gradient over labels drawn from the model is zero; with any other labels it is not.
    sampled, text = (store[0].mean((0, 1)) for store in loss_gradients(stream, hidden, seed=0))
    assert sampled.norm() < 0.1 * text.norm()


def test_measured_rise_is_that_of_the_logits(llama: Path) -> None:
    model = tiny.make("llama")
    stream = open_stream(llama, some_ids(4))
    half = open_stream(llama, some_ids(4)[:2], micro_batch=1)
    ids = torch.cat(half.batches)
    dense, sparse = states(half, 1), states(stream, 2)
    rises = measured_rises(half, dense, stream, [sparse, sparse])
    with torch.no_grad():
        p = whole_logits(model, torch.cat([dense[0], dense[1]])).log_softmax(-1)[:, :-1]
        q = whole_logits(model, sparse[0]).log_softmax(-1)[:, :-1]
    loss = (p - q).gather(2, ids[:, 1:, None]).mean()
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
    assert rises[0] == rises[1]
    assert rises[0].loss == pytest.approx(float(loss), rel=1e-4)
    assert rises[0].kl == pytest.approx(float(kl), rel=1e-4)
    each = (p - q).gather(2, ids[:, 1:, None]).mean((1, 2))  # of the two blocks
    assert rises[0].error == pytest.approx(float((each[0] - each[1]).abs()) / 2, rel=1e-3)
    one = open_stream(llama, some_ids(4)[:1], micro_batch=1)
    assert measured_rises(one, states(one, 1), one, [states(one, 2)])[0].error is None
