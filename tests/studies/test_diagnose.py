"""Diagnosis of a checkpoint: importance, propagation, extremes, texts; each figure against a direct computation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn.functional import kl_div, linear, log_softmax

import wina_calib
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.cli import main
from wina_calib.errors import UsageError
from wina_calib.model.locate import load_tokenizer
from wina_calib.runtime.load import sparse_sites
from wina_calib.studies.defaults import DIAGNOSE_PARTS
from wina_calib.studies.diagnose import Diagnosis, diagnose, spearman
from wina_calib.studies.diagnose.depth import BROKEN
from wina_calib.studies.diagnose.importance import dropping_kl
from wina_calib.studies.diagnose.subject import Subject, only, put, thresholds_at, watch
from wina_calib.studies.diagnose.texts import refitted
from wina_calib.studies.evaluate import DRIFT, evaluation_blocks

TOKENS = 512


@pytest.fixture(scope="module")
def subject(calibrated: Path, text: Path) -> Subject:
    opened = open_checkpoint(calibrated)
    blocks = evaluation_blocks((str(text),), load_tokenizer(calibrated), TOKENS, 128)
    return Subject(opened, wina_calib.load(calibrated), blocks, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def found(calibrated: Path, text: Path) -> Diagnosis:
    return diagnose(calibrated, data=str(text), tokens=TOKENS, amounts=(1, 8), fit_seq_len=64, inputs=3)


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 25, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, -1]) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4
    assert spearman([0, 5, 5, 9], [0, 1, 2, 3]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


# --- importance ------------------------------------------------------------------------------------------------------


def test_importance_of_every_group(found: Diagnosis) -> None:
    assert found.importance is not None
    groups = found.importance.groups
    assert [(g.layer, g.site) for g in groups] == [
        (i, s) for i in range(3) for s in ("attn_in", "attn_out", "mlp_in", "mlp_out")
    ]
    for g in groups:
        assert all(-1 <= v <= 1 for v in (g.norm_output, g.norm_loss, g.magnitude_loss, g.product_loss))
    assert len(found.importance.dropped) == 3 * 4 * 3
    assert all(d.kl >= 0 and d.predicted >= 0 for d in found.importance.dropped)
    measured = found.importance.measured()
    assert set(measured) == {"attn_in", "attn_out", "mlp_in", "mlp_out", "all"}
    # a gradient on a few hundred tokens knows roughly which inputs matter
    assert measured["all"]["predicted"] > 0.6


def test_output_error_of_a_dropped_input(subject: Subject) -> None:
    """`c_j^2 E[x_j^2]` is what dropping j costs; the norm's correlation is with that."""
    model, arch = subject.model, subject.opened.architecture
    seen: list[torch.Tensor] = []
    module = model.get_submodule(arch.layers[1].prefix + "mlp.down_proj")
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    put(model, thresholds_at(model, 0.0))
    with torch.no_grad():
        for ids in subject.blocks.ids:
            model.get_decoder()(input_ids=ids[None], use_cache=False)
    handle.remove()
    x = torch.cat([t[:, 1:].flatten(0, 1) for t in seen]).double()
    weight = module.weight.detach().double()
    errors = []
    for j in range(x.shape[1]):
        dropped = x.clone()
        dropped[:, j] = 0
        errors.append(float((linear(x, weight) - linear(dropped, weight)).square().sum(1).mean()))
    wanted = spearman(weight.norm(dim=0).numpy(), errors)
    own = diagnose(subject.opened.folder, what=("importance",), inputs=0, data=subject.blocks.data, tokens=TOKENS)
    assert own.importance is not None and own.importance.dropped == () and own.importance.measured() == {}
    (got,) = (g for g in own.importance.groups if (g.layer, g.site) == (1, "mlp_out"))
    assert got.norm_output == pytest.approx(wanted, abs=0.02)


def test_dropping_inputs_for_real(subject: Subject) -> None:
    layer = subject.opened.architecture.layers[0]
    site = layer.site("mlp_in")
    put(subject.model, thresholds_at(subject.model, 0.0))
    got = dropping_kl(subject, 0, site, [3, 40])
    ids = subject.blocks.ids[0][None]
    weights = [subject.model.get_submodule(layer.prefix + p.module).weight for p in site.projections]
    with torch.no_grad():
        dense = log_softmax(subject.model(ids).logits[0, :-1].float(), -1)
        for kl, j in zip(got, (3, 40), strict=True):
            kept = [w[:, j].clone() for w in weights]
            for w in weights:
                w[:, j] = 0
            sparse = log_softmax(subject.model(ids).logits[0, :-1].float(), -1)
            for w, column in zip(weights, kept, strict=True):
                w[:, j] = column
            assert kl == pytest.approx(
                float(kl_div(sparse, dense, reduction="none", log_target=True).sum(-1).mean()), rel=1e-3
            )


# --- depth -----------------------------------------------------------------------------------------------------------


def test_propagation(found: Diagnosis, subject: Subject, text: Path, calibrated: Path) -> None:
    growth = found.propagation
    assert growth is not None and len(growth.layers) == 3
    first, last = growth.layers[0], growth.layers[-1]
    assert first.accumulated == pytest.approx(first.alone, rel=1e-5)  # nothing comes before the first layer
    assert last.alone_end == last.alone
    assert last.accumulated > last.alone
    alone = wina_calib.evaluate(calibrated, data=str(text), tokens=TOKENS)
    assert growth.kl == pytest.approx(alone.kl, rel=1e-6)
    assert growth.kl_sum == pytest.approx(sum(g.alone_kl for g in growth.layers))


def test_only_one_layer_is_sparse(subject: Subject) -> None:
    every = thresholds_at(subject.model, 0.5)
    sites = sparse_sites(subject.model)
    one = watch(subject, {"one": only(sites, every, 1)})["one"]
    for (layer, _), achieved in one.quality.sites.items():
        assert (achieved > 0.3) if layer == 1 else (achieved == 0)
    assert one.layers[0] == 0 < one.layers[1]


def test_watching_leaves_no_hooks(subject: Subject) -> None:
    watch(subject, {"all": thresholds_at(subject.model, 0.5)})
    for module in subject.model.get_submodule(subject.opened.architecture.layers_path).children():
        assert not module._forward_hooks


def test_extremes(found: Diagnosis, calibrated: Path, text: Path) -> None:
    assert found.extremes is not None and [e.sparsity for e in found.extremes] == [0.7, 0.8, 0.9]
    for e in found.extremes:
        alone = wina_calib.evaluate(calibrated, data=str(text), sparsity=e.sparsity, tokens=TOKENS)
        assert (e.model_sparsity, e.ppl) == pytest.approx((alone.model_sparsity, alone.sparse_ppl), rel=1e-6)
        assert not e.fitted and len(e.errors) == 3
        over = [i for i, error in enumerate(e.errors) if error > BROKEN]
        assert e.breaks_at == (over[0] if over else None)
        worst = max(alone.sites, key=lambda s: abs(s.achieved - s.asked))
        assert abs(e.worst_drift) == pytest.approx(abs(worst.achieved - worst.asked), abs=1e-6)
    kl = [e.kl for e in found.extremes]
    assert kl == sorted(kl)
    assert "calibrate with these in --grid" in found.text()


# --- texts -----------------------------------------------------------------------------------------------------------


def test_texts(found: Diagnosis) -> None:
    assert found.texts is not None
    got = [(r.fitted_on, r.blocks, r.tested_on) for r in found.texts]
    assert got == [
        ("code", 8, "code"), ("code", 8, "prose"), ("prose", 8, "code"), ("prose", 8, "prose"),
        ("calibration text", 1, "held-out text"), ("calibration text", 8, "held-out text"),
    ]  # fmt: skip
    for row in found.texts:
        assert row.fit_tokens == 64 * row.blocks
        assert row.drifts == (abs(row.model_sparsity - 0.5) > DRIFT)
    one, many = found.texts[-2:]
    assert abs(many.model_sparsity - 0.5) < DRIFT and one.ppl != many.ppl


def test_fitted_again_on_the_same_text_thresholds_stay(subject: Subject, text: Path) -> None:
    facts = subject.opened.settings.provenance
    from wina_calib.corpus.blocks import load_blocks

    tokenizer = load_tokenizer(subject.opened.folder)
    blocks = load_blocks(
        (str(text),), tokenizer, samples=facts["samples"], seq_len=facts["seq_len"], seed=facts["seed"]
    )
    assert blocks.fingerprint == facts["data_fingerprint"]
    own = thresholds_at(subject.model, 0.5)
    for before, after in zip(own, refitted(subject, blocks, 0.5), strict=True):
        assert after.values == pytest.approx(before.values, rel=1e-5)
        assert after.sparsity == pytest.approx(before.sparsity)


def test_text_makes_no_difference_to_a_top_k_selection(llama: Path, text: Path, tmp_path: Path) -> None:
    options = {"transform": "none", "budget": "uniform", "samples": 64, "seq_len": 128, "select": "topk"}
    wina_calib.calibrate(llama, tmp_path / "s", data=str(text), **options)
    got = diagnose(tmp_path / "s", what=("propagation", "texts"), data=str(text), tokens=TOKENS)
    assert got.propagation is not None and got.texts is None and set(got.skipped) == {"texts"}
    assert "texts: left out, each token keeps its highest scores" in got.text()
    assert json.loads(json.dumps(got.to_dict()))["skipped"]["texts"] in got.text()
    with pytest.raises(UsageError, match="nothing to find out"):
        diagnose(tmp_path / "s", what=("texts",), data=str(text), tokens=TOKENS)


# --- the whole -------------------------------------------------------------------------------------------------------


def test_command_line(calibrated: Path, text: Path) -> None:
    before = {p.name: p.read_bytes() for p in calibrated.iterdir()}
    given = ["diagnose", str(calibrated), "--data", str(text), "--tokens", "128", "--amounts", "1", "--inputs", "2"]
    shown = CliRunner().invoke(main, [*given, "--json", "--fit-seq-len", "64"])
    assert shown.exit_code == 0, shown.output
    result = json.loads(shown.stdout)
    assert all(result[name] for name in DIAGNOSE_PARTS) and result["skipped"] == {}
    shown = CliRunner().invoke(main, [*given, "--what", "propagation,extremes", "-s", "0.3", "--extreme", "0.6"])
    assert shown.exit_code == 0 and "single layers as independent errors" in shown.stdout
    assert "importance" not in shown.stdout and "Thresholds were not fitted" not in shown.stdout
    assert {p.name: p.read_bytes() for p in calibrated.iterdir()} == before


def test_bad_input(calibrated: Path) -> None:
    with pytest.raises(UsageError, match="what is nothing"):
        diagnose(calibrated, what=("nothing",))
    with pytest.raises(UsageError, match="sparsities 0.5, 1"):
        diagnose(calibrated, extreme=(1.0,))
    with pytest.raises(UsageError, match="amounts 0"):
        diagnose(calibrated, amounts=(0,))
    for amounts in ("1.5", "inf", "nan"):
        refused = CliRunner().invoke(main, ["diagnose", str(calibrated), "--amounts", amounts])
        assert refused.exit_code == 2 and "whole numbers" in refused.output
