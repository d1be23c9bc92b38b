"""Selection by top-k, open-loop thresholds and masked first tokens: in calibration, in the loaded model, in the counts."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

import wina_calib
from wina_calib.calibration.apply_budget import Refit, apply
from wina_calib.calibration.dropped_levels import CURVE_LEVELS, dropped_ranks, ranks
from wina_calib.calibration.rebudget import Request, choose
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.checkpoint.settings import Settings
from wina_calib.masks.mask import keep_mask, keep_top, kept_inputs, mask_inputs
from wina_calib.masks.rule import MaskRule
from wina_calib.runtime import insert_sites
from wina_calib.runtime.load import runtime_state, sparse_sites

SMALL = {
    "samples": 64,
    "seq_len": 128,
    "budget": "uniform",
    "transform": "none",
    "sparsity": 0.5,
    "grid": (0.25, 0.5, 0.65),
}


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_k_are_kept_and_they_are_the_highest(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 40).to(dtype)  # in bfloat16 many scores are equal
    norm = torch.ones(40)
    for k in (1, 7, 20, 39, 40):
        keep = keep_mask(x, norm, k)
        assert (keep.sum(-1) == k).all()
        score = x.float().abs()
        lowest_kept = score.masked_fill(~keep, torch.inf).amin(-1)
        assert (score.masked_fill(keep, -1.0).amax(-1) <= lowest_kept).all()


def test_of_equal_scores_the_first_are_kept() -> None:
    score = torch.tensor([[2.0, 1.0, 2.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert keep_top(score, 3).tolist() == [[True, False, True, False, True], [True, True, True, False, False]]
    assert keep_top(score, 9).all()


def test_not_a_number_is_kept() -> None:
    assert keep_top(torch.tensor([1.0, torch.nan, 3.0, 2.0]), 2)[1]


def test_number_of_kept_inputs() -> None:
    assert [kept_inputs(10, s) for s in (0.0, 0.04, 0.05, 0.5, 0.65, 0.99)] == [10, 10, 9, 5, 3, 1]
    assert kept_inputs(4096, 0.25) == 3072


def test_dense_rows_are_kept_whole() -> None:
    x = torch.randn(2, 3, 16)
    rows = torch.tensor([[True, False, False], [True, False, False]])
    out = mask_inputs(x, torch.rand(16), 4, "wina", rows)
    assert torch.equal(out[:, 0], x[:, 0])
    assert ((out[:, 1:] != 0).sum(-1) == 4).all()


def test_ranks_drop_what_the_mask_drops() -> None:
    score = torch.randint(0, 9, (20, 16)).float()
    limits = dropped_ranks(16)
    for level in (3, 10, 25, 37):
        keep = keep_top(score, kept_inputs(16, CURVE_LEVELS[1:][level]))
        assert torch.equal(ranks(score) > limits[level], keep)


# --- top-k in calibration and in the loaded model --------------------------------------------------------------------


@pytest.fixture(scope="module", params=["shared", "per-projection"])
def topk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("topk") / "s"
    wina_calib.calibrate(llama, folder, data=str(text), select="topk", masks=request.param, **SMALL)
    return folder


def site_inputs(model: torch.nn.Module, ids: torch.Tensor) -> dict[tuple[int, str, str], list[torch.Tensor]]:
    """What every projection multiplies, and its output, by (layer, site, projection)."""
    seen: dict[tuple[int, str, str], list[torch.Tensor]] = {}
    hooks = [
        member.register_forward_hook(
            lambda m, args, out, key=(site.layer, site.site.name, member.name): seen.update({key: [args[0], out]})
        )
        for site in sparse_sites(model)
        for member in site.linears
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.65])
def test_every_projection_reads_its_k_highest_scores(topk: Path, sparsity: float) -> None:
    model = wina_calib.load(topk, sparsity)
    seen = site_inputs(model, torch.randint(4, 300, (2, 20)))
    for site in sparse_sites(model):
        assert site.asked == pytest.approx(sparsity, abs=1e-6)
        width = site.site.width
        kept = width - int(site.asked * width + 0.5)
        for member in site.linears:
            x, out = seen[site.layer, site.site.name, member.name]
            score = x.abs() * site.group(member.group).norm
            order = score.argsort(dim=-1, descending=True, stable=True)[..., :kept]
            keep = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, order, True)
            keep[:, 0] = True
            assert torch.equal(out, linear(x * keep, member.weight, member.bias)), (site.layer, member.name)


def test_counts_are_exact_and_follow_set_sparsity(topk: Path) -> None:
    model = wina_calib.load(topk)
    ids = torch.randint(4, 300, (2, 50))
    for sparsity in (0.5, 0.25, 0.7):
        wina_calib.set_sparsity(model, sparsity)
        with runtime_state(model).counting() as counts, torch.no_grad():
            model(ids, use_cache=False)
        for site in sparse_sites(model):
            width = site.site.width
            share = (width - kept_inputs(width, site.asked)) / width * 49 / 50
            assert counts[site.layer, site.site.name].sparsity == pytest.approx(share, abs=1e-12)


def test_sparsity_0_is_the_dense_model_bit_for_bit(topk: Path, llama: Path) -> None:
    ids = torch.randint(4, 300, (2, 20))
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(llama)(ids).logits
        assert torch.equal(wina_calib.load(topk, 0.0)(ids).logits, dense)


def test_saved_and_loaded_it_still_takes_the_top_k(topk: Path, tmp_path: Path) -> None:
    model = wina_calib.load(topk, 0.4)
    ids = torch.randint(4, 300, (1, 30))
    model.save_pretrained(tmp_path / "again")
    again = wina_calib.load(tmp_path / "again")
    assert open_checkpoint(tmp_path / "again").settings.select == "topk"
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    whole = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(again.generate(ids, max_new_tokens=5, do_sample=False), whole)


def test_evaluate_counts_the_top_k(topk: Path, text: Path) -> None:
    found = wina_calib.evaluate(topk, data=str(text), tokens=2048, sparsity=0.5)
    assert found.model_sparsity == pytest.approx(0.5 * 126 / 127, abs=1e-9)


def test_no_kernel_serves_top_k(topk: Path, calibrated: Path, caplog: pytest.LogCaptureFixture) -> None:
    insert_sites._say_once.cache_clear()
    wina_calib.load(calibrated)
    assert "no kernel" not in caplog.text
    model = wina_calib.load(topk)
    assert "select topk, score wina: no kernel serves this" in caplog.text
    runtime_state(model).refresh()
    assert all(member.packed is None for site in sparse_sites(model) for member in site.linears)


@pytest.mark.parametrize("budget", [pytest.param("greedy", marks=pytest.mark.slow), "global"])
def test_budgets_with_top_k(budget: str, llama: Path, text: Path, tmp_path: Path) -> None:
    options = SMALL | {"budget": budget, "samples": 64, "select": "topk", "grid": (0.5,)}
    wina_calib.calibrate(llama, tmp_path / "s", data=str(text), **options)
    found = wina_calib.evaluate(tmp_path / "s", data=str(text), tokens=2048)
    assert found.model_sparsity == pytest.approx(0.5, abs=0.012)
    assert np.std([site.asked for site in found.sites]) > 0


def test_a_budget_change_keeps_the_selection(topk: Path, tmp_path: Path) -> None:
    shutil.copytree(topk, tmp_path / "s")
    opened = open_checkpoint(tmp_path / "s")
    settings = apply(choose(opened, Request()), opened, refit=Refit())
    assert settings.select == "topk"
    before, after = (open_checkpoint(folder).tensors for folder in (topk, tmp_path / "s"))
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


# --- open loop, first tokens -----------------------------------------------------------------------------------------


def tables(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for n, t in open_checkpoint(folder).tensors.items() if n.endswith(".table")}


def test_open_loop_tables_are_the_dense_models(llama: Path, text: Path, tmp_path: Path) -> None:
    options = SMALL | {"grid": (0.001, 0.5, 0.65), "data": str(text)}
    wina_calib.calibrate(llama, tmp_path / "open", loop="open", **options)
    wina_calib.calibrate(llama, tmp_path / "closed", **options)
    for name, table in tables(tmp_path / "open").items():
        closed = tables(tmp_path / "closed")[name]
        assert torch.equal(table, table[:1].expand_as(table))  # one dense model at every anchor
        assert torch.allclose(table[0], closed[0], rtol=0.02, atol=1e-5)  # nearly dense: nearly the same
    last = "model.layers.2.wina.mlp_out.shared.table"
    closed, dense = (tables(tmp_path / name)[last][2] for name in ("closed", "open"))
    assert float((closed / dense - 1)[20:180].abs().mean()) > 0.01
    opened = open_checkpoint(tmp_path / "open")
    assert opened.settings.provenance["loop"] == "open"
    errors = [t for n, t in opened.tensors.items() if n.endswith(".error")]
    assert all((e > 0).all() and (e < 1).all() for e in errors)


def test_open_loop_measures_the_loss_of_the_sparse_model(llama: Path, text: Path, tmp_path: Path) -> None:
    options = SMALL | {"budget": "global", "data": str(text), "loop": "open"}
    wina_calib.calibrate(llama, tmp_path / "s", **options)
    assert min(open_checkpoint(tmp_path / "s").settings.provenance["prediction"]["kl"]) > 0


def test_first_tokens_can_be_masked_too(llama: Path, text: Path, tmp_path: Path) -> None:
    wina_calib.calibrate(llama, tmp_path / "s", first_token="sparse", data=str(text), **SMALL)
    found = wina_calib.evaluate(tmp_path / "s", data=str(text), tokens=8192)
    assert found.model_sparsity == pytest.approx(0.5, abs=0.003)
    model = wina_calib.load(tmp_path / "s")
    dense = wina_calib.load(tmp_path / "s", 0.0)
    ids = torch.randint(4, 300, (1, 1))
    with torch.no_grad():
        assert not torch.equal(model(ids, use_cache=False).logits, dense(ids, use_cache=False).logits)
    rule = MaskRule(first_token="sparse")
    x = torch.randn(2, 3, 4)
    assert rule.masked_rows(x) is x and rule.dense_rows(x) is None


def test_a_config_without_the_new_keys_means_the_defaults() -> None:
    raw = Settings(0.5, (0.5,)).to_dict()
    del raw["select"], raw["first_token"]
    read = Settings.from_dict(raw)
    assert (read.select, read.first_token) == ("threshold", "dense")
    with pytest.raises(wina_calib.WinaError, match="select is 'best'"):
        Settings.from_dict(raw | {"select": "best"})
