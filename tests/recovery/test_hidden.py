"""Hidden states in the loss: compared in the same axes, layer by layer."""

import pytest
import tiny
import torch

from wina_calib.recovery.hidden import distance, layer_outputs, rotation_between


def test_the_rotation_is_found_again() -> None:
    torch.manual_seed(0)
    dense, q = torch.randn(300, 16), torch.linalg.qr(torch.randn(16, 16))[0]
    torch.testing.assert_close(rotation_between(dense.bfloat16(), (dense @ q).bfloat16()), q, atol=5e-3, rtol=0)


def test_there_is_none_to_another_model() -> None:
    torch.manual_seed(0)
    assert rotation_between(torch.randn(300, 16), torch.randn(300, 16)) is None
    dense = torch.randn(300, 16)
    assert rotation_between(dense, dense * torch.linspace(0.5, 2, 16)) is None


def test_the_distance_is_a_share_of_each_states_square() -> None:
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(16, 16))[0]
    dense = [torch.randn(2, 5, 16) * scale for scale in (1.0, 100.0)]
    turned = [state @ q for state in dense]
    assert float(distance(turned, dense, q)) < 1e-9
    assert float(distance([1.1 * state for state in turned], dense, q)) == pytest.approx(0.01, rel=1e-3)
    first = [state.clone() for state in turned]
    for state in first:
        state[:, 0] = 1e6  # of the first token nothing counts
    assert float(distance(first, dense, q)) < 1e-9


def test_layers_outputs_are_caught_within_the_context_alone() -> None:
    model = tiny.make("llama")
    ids = torch.randint(4, 300, (1, 9))
    with layer_outputs(model.model.layers) as found:
        whole = model(ids, output_hidden_states=True).hidden_states
    model(ids)
    assert len(found) == 3
    for caught, expected in zip(found[:-1], whole[1:-1], strict=True):  # the last one is after the final norm there
        assert torch.equal(caught, expected)
