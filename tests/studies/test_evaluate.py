"""`evaluate` against figures computed here from the base model's weights and the stored thresholds alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

import wina_calib
from wina_calib.model.locate import load_tokenizer
from wina_calib.studies.evaluate import evaluation_blocks

SITES = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.o_proj",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_out": ("mlp.down_proj",),
}


def masked(
    model: PreTrainedModel, stored: dict[str, torch.Tensor], dropped: dict[tuple[int, str], list[float]]
) -> None:
    """Mask every site's inputs by hooks on a plain model, but for the first token of a sequence; note the shares dropped."""
    for index, layer in enumerate(model.model.layers):
        for site, names in SITES.items():
            modules = [layer.get_submodule(name) for name in names]
            norm = torch.cat([module.weight for module in modules]).norm(dim=0)
            threshold = stored[f"model.layers.{index}.wina.{site}.shared.threshold"]

            def hook(
                module: torch.nn.Module,
                args: tuple[torch.Tensor],
                first: torch.nn.Module = modules[0],
                key: tuple[int, str] = (index, site),
                norm: torch.Tensor = norm,
                threshold: torch.Tensor = threshold,
            ) -> torch.Tensor:
                drop = args[0].abs() * norm <= threshold
                drop[:, 0] = False
                if module is first:
                    dropped.setdefault(key, []).append(float(drop.double().mean()))
                return args[0].masked_fill(drop, 0.0)

            for module in modules:
                module.register_forward_pre_hook(hook)


def outputs(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(row[None, :-1], use_cache=False).logits[0].double() for row in ids]


def test_every_figure_by_hand(calibrated: Path, llama: Path, text: Path) -> None:
    found = wina_calib.evaluate(calibrated, data=text, tokens=1280)
    ids = evaluation_blocks((str(text),), load_tokenizer(calibrated), 1280, 128).ids
    assert ids.shape == (10, 128)
    dense = outputs(AutoModelForCausalLM.from_pretrained(llama), ids)
    model = AutoModelForCausalLM.from_pretrained(llama)
    dropped: dict[tuple[int, str], list[float]] = {}
    masked(model, load_file(calibrated / "wina.safetensors"), dropped)
    sparse = outputs(model, ids)

    def mean(figure: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        return float(torch.cat([figure(d, s, row[1:]) for d, s, row in zip(dense, sparse, ids, strict=True)]).mean())

    assert found.tokens == 10 * 127
    base = mean(lambda d, s, row: cross_entropy(d, row, reduction="none"))
    rise = mean(lambda d, s, row: cross_entropy(s, row, reduction="none"))
    assert found.dense_ppl == pytest.approx(torch.tensor(base).exp().item(), rel=1e-5)
    assert found.sparse_ppl == pytest.approx(torch.tensor(rise).exp().item(), rel=1e-4)
    kl = mean(lambda d, s, row: (d.softmax(-1) * (d.log_softmax(-1) - s.log_softmax(-1))).sum(-1))
    assert kl > 0.001
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert found.top1_agreement == pytest.approx(
        mean(lambda d, s, row: (d.argmax(-1) == s.argmax(-1)).double()), abs=2 / found.tokens
    )

    achieved = {key: sum(shares) / len(shares) for key, shares in dropped.items()}
    assert {(s.layer, s.site): s.achieved for s in found.sites} == pytest.approx(achieved, abs=1e-3)
    sizes = {"attn_in": 64 * 128, "attn_out": 64 * 64, "mlp_in": 64 * 256, "mlp_out": 128 * 64}
    total, norms, head = 3 * sum(sizes.values()), 7 * 64, 320 * 64
    saved = sum(sizes[site] * share for (_, site), share in achieved.items())
    assert found.model_sparsity == pytest.approx(saved / total, abs=1e-3)
    assert found.read_fraction_decoder == pytest.approx((total - saved + norms) / (total + norms), abs=1e-3)
    assert found.read_fraction == pytest.approx((total - saved + norms + head) / (total + norms + head), abs=1e-3)


@pytest.mark.parametrize(("word", "drifts"), [(None, False), ("zzzzzzzz ", True)])
def test_a_text_of_another_kind_is_warned_of(
    word: str | None, drifts: bool, calibrated: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(text.read_text() if word is None else word * 2000)
    found = wina_calib.evaluate(calibrated, data=str(tmp_path / "text.txt"), tokens=2048)
    assert (abs(found.model_sparsity - found.sparsity) > 0.02) is drifts
    assert any("is off the asked 0.500" in w and "--data" in w for w in found.warnings) is drifts


def test_run_time_matrices_count_as_read(llama: Path, text: Path, tmp_path: Path) -> None:
    options = {"data": str(text), "samples": 80, "seq_len": 128, "budget": "uniform", "grid": (0.5,)}
    wina_calib.calibrate(llama, tmp_path / "s", transform="stacked", **options)
    found = wina_calib.evaluate(tmp_path / "s", data=str(text), tokens=512)
    sparse, norms, matrices = 3 * (64 * 128 + 64 * 64 + 64 * 256 + 128 * 64), 7 * 64, 3 * 2 * 64 * 64
    read = sparse * (1 - found.model_sparsity) + norms + matrices
    assert found.read_fraction_decoder == pytest.approx(read / (sparse + norms))
    assert found.read_fraction == pytest.approx((read + 320 * 64) / (sparse + norms + 320 * 64))
