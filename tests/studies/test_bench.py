"""Benchmarks: the JSON's shape, the sparsity that is really run, one set of weights, fitted thresholds, the command."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner

import wina_calib
from wina_calib.cli import main
from wina_calib.common.memory import return_freed_memory
from wina_calib.errors import UsageError
from wina_calib.model.architecture import describe
from wina_calib.quantization.formats import WeightFormat
from wina_calib.runtime.fast_path import attention
from wina_calib.runtime.kernels import dispatch, native
from wina_calib.runtime.load import sparse_sites
from wina_calib.studies.bench import Timing, bench, compare, models, products
from wina_calib.studies.bench.decode import make_variants, measure
from wina_calib.studies.bench.instruments import PeakMemory, copy_bandwidth

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
DENSE = {
    "ms_per_token",
    "ms_per_token_spread",
    "tokens_per_s",
    "bytes_per_token",
    "roof_share",
    "prefill_ms",
    "peak_memory_bytes",
    "eager_ms_per_token",
    "merged_ms_per_token",
}
SPARSE = DENSE - {"eager_ms_per_token", "merged_ms_per_token"} | {
    "sparsity",
    "achieved_sparsity",
    "bits_read",
    "read_fraction",
    "limit",
    "speedup",
    "speedup_spread",
    "prefill_ratio",
}
WHOLE = {
    "model",
    "device",
    "dtype",
    "threads",
    "compiled",
    "onednn",
    "prompt",
    "new",
    "rounds",
    "roof_gb_s",
    "versions",
    "bits",
    "fixed_ms",
    "dense",
    "results",
}
QUICK = ["--prompt", "12", "--new", "6", "--rounds", "2"]


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the roof on little memory: its value is not what is tested."""
    monkeypatch.setattr("wina_calib.studies.bench.instruments.ROOF_BYTES", {"cpu": 4 << 20})
    monkeypatch.setattr("wina_calib.studies.bench.site_products.SPAN_BYTES", {"cpu": 1 << 16})


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(SHAPE))
    return path


def run(*args: str) -> dict:
    done = CliRunner().invoke(main, ["-q", "bench", *args, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def check(found: dict, sparsities: list[float]) -> None:
    assert set(found) == WHOLE
    assert set(found["dense"]) == DENSE
    assert [row["sparsity"] for row in found["results"]] == sparsities
    assert found["roof_gb_s"] > 0
    for row in [found["dense"], *found["results"]]:
        low, high = row["ms_per_token_spread"]
        assert 0 < low <= row["ms_per_token"] <= high
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["ms_per_token"])
        assert row["prefill_ms"] > 0
        assert row["peak_memory_bytes"] > row["bytes_per_token"]
        assert row["roof_share"] > 0
    for row in found["results"]:
        assert set(row) == SPARSE
        assert row["limit"] == pytest.approx(1 / row["read_fraction"])
        assert row["bytes_per_token"] == pytest.approx(
            row["read_fraction"] * found["dense"]["bytes_per_token"], rel=1e-4
        )
        assert 0.05 < row["speedup"] < 20


def test_the_demo_model_as_json() -> None:
    found = run("demo", "--sparsity", "0,0.4", *QUICK)
    check(found, [0.0, 0.4])
    assert found["dtype"] == "float32"
    assert found["results"][0]["achieved_sparsity"] == 0.0
    assert found["results"][0]["read_fraction"] == 1.0
    assert found["results"][1]["achieved_sparsity"] == pytest.approx(0.4, abs=0.02)


@pytest.mark.slow
def test_the_demo_model_calibrated(demo_sparse: Path) -> None:
    found = run(str(demo_sparse), "--sparsity", "0,0.4", *QUICK)
    check(found, [0.0, 0.4])
    assert found["results"][0]["achieved_sparsity"] == 0.0
    # Calibrated on other text than is run here, and few tokens: near, not on it.
    assert found["results"][1]["achieved_sparsity"] == pytest.approx(0.4, abs=0.06)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights_run_at_the_asked_sparsity(shape: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "CPU_MIN_SAVED", 1)
    found = run("--random", str(shape), "--sparsity", "0.5,0.65", "--dtype", dtype, *QUICK)
    check(found, [0.5, 0.65])
    assert found["dtype"] == dtype
    assert not found["compiled"]
    for row in found["results"]:
        assert row["achieved_sparsity"] == pytest.approx(row["sparsity"], abs=0.02)
    weights = 2 * (64 * (64 + 32 + 32) + 64 * 64 + 64 * 256 + 128 * 64) + 5 * 64 + 320 * 64
    assert found["dense"]["bytes_per_token"] == weights * (4 if dtype == "float32" else 2)


def test_a_plain_model_is_fitted_to_what_is_run(llama: Path) -> None:
    result = bench(str(llama), sparsities=(0.3,), prompt=12, new=8, rounds=1)
    assert result.results[0].achieved_sparsity == pytest.approx(0.3, abs=0.02)
    assert (
        "30.0 %" in result.render() and "speed-up: median over pairs of dense time over sparse time" in result.render()
    )
    assert result.to_dict()["results"][0]["sparsity"] == 0.3


def test_the_demo_model_is_too_small_to_gather_with_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    pair = models.open_pair("demo", device=torch.device("cpu"), dtype=None)
    models.fit(pair, (0.65,), torch.arange(4, 28)[None], 12)
    linears = [linear for site in sparse_sites(pair.sparse) for linear in site.linears]
    assert all(linear.packed is not None and not linear.packed.columns for linear in linears)


def test_text_for_people(calibrated: Path) -> None:
    done = CliRunner().invoke(main, ["-q", "bench", str(calibrated), "-s", "0.4", *QUICK])
    assert done.exit_code == 0, done.output
    assert "speed-up" in done.output
    assert "40.0 % (real " in done.output


def test_both_models_have_the_same_weights_and_share_the_rest(llama: Path) -> None:
    pair = models.open_pair(str(llama), device=torch.device("cpu"), dtype=None)
    sites = {layer.prefix + p.module + ".weight" for layer, s in describe(pair.dense).sites for p in s.projections}
    dense, sparse = pair.dense.state_dict(), pair.sparse.state_dict()
    for name, tensor in dense.items():
        assert torch.equal(tensor, sparse[name])
        assert (tensor.data_ptr() == sparse[name].data_ptr()) == (name not in sites)
    ids = torch.arange(24)[None]
    models.fit(pair, (0.5,), ids, 12)
    assert len(sparse_sites(pair.sparse)) == 12
    assert not hasattr(pair.dense.model.layers[0], "wina")


def test_dense_is_the_model_that_was_calibrated(calibrated: Path) -> None:
    pair = models.open_pair(str(calibrated), device=torch.device("cpu"), dtype=None)
    assert pair.calibrated
    ids = torch.arange(4, 24)[None]
    with torch.no_grad(), pair.state.densely():
        assert torch.allclose(pair.dense(ids).logits, pair.sparse(ids).logits, atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_random_models_of_every_family(family: str, tmp_path: Path) -> None:
    config = tiny.make(family).config
    config.save_pretrained(tmp_path)
    pair = models.random_pair(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32, seed=0)
    ids = torch.randint(320, (1, 20), generator=torch.Generator().manual_seed(0))
    models.fit(pair, (0.5,), ids, 10)
    with torch.no_grad():
        assert bool(pair.dense(ids).logits.isfinite().all())
    result = compare(pair, (0.5,), ids, 10, rounds=1, compiled=False)
    assert result.results[0].achieved_sparsity == pytest.approx(0.5, abs=0.05)
    assert models.random_pair(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32, seed=0).dense.device.type


def test_on_a_cpu_the_stock_model_is_timed_beside_one_with_this_packages_attention(
    shape: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = models.random_pair(str(shape), device=torch.device("cpu"), dtype=torch.float32, seed=0)
    ids = torch.randint(320, (1, 16), generator=torch.Generator().manual_seed(0))
    models.fit(pair, (0.5,), ids, 8)
    package, timed = sys.modules["wina_calib.studies.bench"], []

    def noted(*args: Any, **options: Any) -> None:
        timed.append(pair.dense.config._attn_implementation)
        measure(*args, **options)

    monkeypatch.setattr(package, "measure", noted)
    result = compare(pair, (0.5,), ids, 8, rounds=1, compiled=False)
    assert timed == ["sdpa", attention.NAME]
    assert result.dense.eager_ms_per_token > 0
    assert "dense as transformers runs it" in result.render()


def test_every_variant_runs_in_every_round(shape: Path) -> None:
    pair = models.random_pair(str(shape), device=torch.device("cpu"), dtype=torch.float32, seed=0)
    ids = torch.randint(320, (1, 16), generator=torch.Generator().manual_seed(0))
    models.fit(pair, (0.25, 0.5), ids, 8)
    groups = make_variants(pair, (0.25, 0.5), ids, 8, compiled=False)
    compare(pair, (0.25, 0.5), ids, 8, rounds=3, compiled=False, groups=groups)
    for variant in groups[0]:
        assert len(variant.prefill_ms) == 3
        assert len(variant.step_ms) == 3 * 2
        assert variant.session.position == 16


@pytest.mark.slow
def test_compiled_steps_have_no_breaks_and_no_recompiles(shape: Path) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    pair = models.random_pair(str(shape), device=torch.device("cpu"), dtype=torch.float32, seed=0)
    ids = torch.randint(320, (1, 16), generator=torch.Generator().manual_seed(0))
    models.fit(pair, (0.25, 0.5), ids, 8)
    groups = make_variants(pair, (0.25, 0.5), ids, 8, compiled=True)
    for group in groups:
        for variant in group:
            variant.session.forward = torch.compile(
                variant.session.model.__call__, fullgraph=True, backend="eager", dynamic=False
            )
    result = compare(pair, (0.25, 0.5), ids, 8, rounds=2, compiled=True, groups=groups)
    # One graph each: dense, sparse at any sparsity, sparse modules computing everything.
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]
    assert result.compiled
    assert result.dense.eager_ms_per_token > 0
    assert result.dense.merged_ms_per_token > 0
    assert "with one product a site" in result.render()


def test_products_of_one_layer(shape: Path) -> None:
    found = run("--random", str(shape), "--kernel-only", "--sparsity", "0,0.5")
    assert [row["achieved_sparsity"] for row in found["results"]] == [0.0, 0.5]
    assert [row["read_fraction"] for row in found["results"]] == [1.0, 0.5]
    assert found["dense"]["bytes_per_layer"] == 2 * found["results"][1]["bytes_per_layer"]
    assert all(row["ms_per_layer"] > 0 and row["speedup"] > 0 for row in found["results"])
    text = products(str(shape), sparsities=(0.5,), device=torch.device("cpu"), dtype=torch.float32).render()
    assert "ms/layer" in text and "speed-up: median over pairs" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "one of the two"),
        (["demo", "--random", "demo"], "one of the two"),
        (["llama-3-8b"], "--random llama-3-8b"),
        (["demo", "-s", "1.0"], "expected numbers"),
        (["demo", "-s", ""], "expected numbers"),
        (["demo", "--new", "0"], "new is 0"),
        (["demo", "--prompt", "3000"], "the model takes 2048"),
        (["--random", "lama-3-8b"], "Nearest known: llama-3-8b"),
        (["--kernel-only"], "--random CONFIG"),
        (["demo", "--kernel-only", "-s", "200%"], "expected numbers"),
    ],
)
def test_wrong_options_are_refused(args: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["bench", *args])
    assert done.exit_code == 2, done.output
    assert message in done.output


def test_medians_and_quartiles() -> None:
    assert Timing.of([3.0]).spread == (3.0, 3.0)
    assert Timing.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Timing(3.0, 2.0, 4.0)
    with pytest.raises(UsageError):
        bench()


def test_memory_and_roof() -> None:
    watch = PeakMemory(torch.device("cpu"))
    return_freed_memory()  # of other tests, which the tensor would lie in
    with watch.watching():
        kept = torch.ones(1 << 24)
    assert watch.bytes == 0 or watch.bytes > 0.5 * kept.nbytes
    assert copy_bandwidth(torch.device("cpu")) > 1e8


@pytest.mark.parametrize("bits", ["4", "8"])
def test_bits(shape: Path, bits: str) -> None:
    command = [
        "bench",
        "--random",
        str(shape),
        "--device",
        "cpu",
        "--bits",
        bits,
        "--group-size",
        "32",
        "-s",
        "0,0.5",
        *QUICK,
    ]
    done = CliRunner().invoke(main, [*command, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["bits"] == int(bits)
    dense, half = found["results"]
    real = half["achieved_sparsity"]
    assert dense["bits_read"] == pytest.approx({"4": 4 + 20 / 32, "8": 8}[bits], abs=0.02)
    assert half["bits_read"] == pytest.approx(dense["bits_read"] * (1 - real))
    assert half["bytes_per_token"] < dense["bytes_per_token"] < found["dense"]["bytes_per_token"]
    assert half["limit"] == pytest.approx(found["dense"]["bytes_per_token"] / half["bytes_per_token"])
    assert found["fixed_ms"] > 0


def test_a_quantized_checkpoint_and_what_cannot_be(tmp_path: Path, llama: Path, text: Path) -> None:
    folder = tmp_path / "sparse"
    options = {"bits": 4, "group_size": 32, "budget": "uniform", "transform": "none", "grid": (0.5,)}
    options |= {"data": str(text), "samples": 80, "seq_len": 128}
    wina_calib.calibrate(llama, folder, **options)
    found = bench(str(folder), sparsities=(0.5,), device="cpu", prompt=12, new=6, rounds=1)
    assert found.bits == 4
    assert found.results[0].bits_read < 4.7
    with pytest.raises(UsageError, match="leave --bits out"):
        bench(str(folder), bits=4, device="cpu")


def test_a_plain_model_is_quantized_from_its_weights(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "QUANTIZED_INPUTS", 16)
    pair = models.open_pair(str(llama), device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        for layer in pair.dense.model.layers:
            layer.mlp.down_proj.weight[:, :16].mul_(4)  # scales of some inputs alone would be too small
    ids = torch.randint(4, 300, (1, 16))
    models.fit(pair, (0.5,), ids, 8, WeightFormat(8))
    with torch.no_grad(), pair.state.densely():
        expected, found = pair.dense(ids).logits, pair.sparse(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 0.03
