"""CATS: masks of the gate against a forward pass written by hand, thresholds, shares."""

from pathlib import Path

import pytest
import tiny
import torch
from torch.nn.functional import linear, silu

from wina_calib.calibration.compute import Compute
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.corpus.blocks import load_blocks
from wina_calib.model.architecture import describe
from wina_calib.model.source import open_source
from wina_calib.studies.compare.cats import activation, fit_gates, gated_share, mask_gate, masked_gates

THRESHOLDS = torch.tensor([0.05, 0.1, 0.02])


def test_masked_mlp_is_the_papers_product(llama: Path) -> None:
    model = tiny.make("llama")
    seen = {}
    mlp = model.model.layers[1].mlp
    mlp.register_forward_hook(lambda m, args, out: seen.update(x=args[0], out=out))
    ids = torch.randint(4, 300, (2, 16))
    with torch.no_grad(), masked_gates(model, describe(model), THRESHOLDS):
        model(ids)
        x = seen["x"]
        gate = silu(linear(x, mlp.gate_proj.weight))
        for row in range(2):
            for token in range(16):
                kept = gate[row, token].abs() > (THRESHOLDS[1] if token else -1.0)
                up = x[row, token] @ mlp.up_proj.weight[kept].T  # up's other outputs are never computed
                expected = (gate[row, token][kept] * up) @ mlp.down_proj.weight[:, kept].T
                assert torch.allclose(seen["out"][row, token], expected, atol=1e-6)
        assert 0 < int(kept.sum()) < len(kept)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_down_reads_is_zero_where_the_gate_is_small(family: str) -> None:
    model = tiny.make(family)
    arch = describe(model)
    reads: list[torch.Tensor] = []
    gates: list[torch.Tensor] = []
    layer = model.get_submodule(arch.layers_path)[0]
    activation(arch.layers[0], layer).register_forward_hook(lambda m, args, out: gates.append(out.clone()))
    layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: reads.append(args[0]))
    ids = torch.randint(4, 300, (2, 16))
    with torch.no_grad(), masked_gates(model, arch, torch.full((3,), 0.1)) as count:
        model(ids)
    (gate,), (read,) = gates, reads  # the first hook sees what the mask changes
    dropped = gate.abs() <= 0.1
    dropped[:, 0] = False
    assert 0 < int(dropped.sum()) < dropped.numel()
    assert torch.equal(read == 0, dropped)
    assert count.seen == 3 * dropped.numel() and count.dropped > 0


def test_hooks_are_gone_and_zero_threshold_keeps_all() -> None:
    model = tiny.make("llama")
    ids = torch.randint(4, 300, (1, 8))
    with torch.no_grad():
        dense = model(ids).logits
        with masked_gates(model, describe(model), torch.full((3,), -1.0)) as count:
            assert torch.equal(model(ids).logits, dense)
        assert count.dropped == 0
        with masked_gates(model, describe(model), torch.full((3,), 10.0)):
            assert not torch.equal(model(ids).logits, dense)
        assert torch.equal(model(ids).logits, dense)
    assert torch.equal(mask_gate(torch.ones(1, 2, 3), 2.0), torch.tensor([[[1.0] * 3, [0.0] * 3]]))


def test_fitted_thresholds_meet_their_sparsity_in_the_whole_model(llama: Path, text: Path) -> None:
    source = open_source(str(llama))
    ids = load_blocks([str(text)], source.tokenizer(), samples=32, seq_len=128, seed=0, min_tokens=2).ids
    stream = LayerStream(source, ids, Compute(torch.device("cpu"), torch.float32, 16))
    fitted = fit_gates(stream, (0.3, 0.8))
    model = tiny.make("llama")
    for thresholds, sparsity in zip(fitted, (0.3, 0.8), strict=True):
        with torch.no_grad(), masked_gates(model, source.architecture, thresholds) as count:
            model(ids)
        assert count.dropped / count.seen == pytest.approx(sparsity * 127 / 128, abs=0.003)


def test_share_that_can_be_spared() -> None:
    for family in ("llama", "phi3"):  # separate and fused
        arch = describe(tiny.make(family))
        mlp, attention = 3 * 128 * 64, 2 * 64 * 64 + 2 * 32 * 64
        assert gated_share(arch) == pytest.approx(2 / 3 * mlp / (mlp + attention))
