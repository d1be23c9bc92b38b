"""How fast a model decodes, dense against sparse, in one process."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from wina_calib.common.bars import Hearing, hearing
from wina_calib.common.devices import device_name, pick_device, pick_dtype
from wina_calib.common.progress import SILENT, Progress
from wina_calib.corpus.blocks import load_blocks
from wina_calib.corpus.sources import HELDOUT
from wina_calib.errors import UsageError, WinaError
from wina_calib.model.locate import load_tokenizer
from wina_calib.quantization.formats import WeightFormat
from wina_calib.runtime.fast_path import attention, lm_head
from wina_calib.studies.bench.decode import Variant, achieved, fixed_cost, make_variants, measure, session, warn_of_far
from wina_calib.studies.bench.instruments import PeakMemory, copy_bandwidth, versions
from wina_calib.studies.bench.models import Pair, fit, open_pair, own_bytes, random_pair
from wina_calib.studies.bench.results import Bench, Dense, Products, Sparse, Timing
from wina_calib.studies.bench.site_products import products
from wina_calib.studies.defaults import BENCH_NEW, BENCH_PROMPT, BENCH_ROUNDS, BENCH_SPARSITIES
from wina_calib.studies.flops import check_sparsities, presets

__all__ = ["Bench", "Dense", "Products", "Sparse", "Timing", "bench", "compare", "products"]

logger = logging.getLogger(__name__)


def bench(
    model: str | None = None,
    *,
    random: str | None = None,
    sparsities: Sequence[float] = BENCH_SPARSITIES,
    device: str = "auto",
    dtype: str = "auto",
    prompt: int = BENCH_PROMPT,
    new: int = BENCH_NEW,
    rounds: int = BENCH_ROUNDS,
    compiled: bool | None = None,
    bits: int = 0,
    group_size: int = 64,
    seed: int = 0,
    progress: Hearing = None,
) -> Bench:
    """Time decoding with a static cache through the model's own forward, dense and sparse in turn.

    Args:
        model: a calibrated checkpoint, or a plain model, whose thresholds are then fitted to the tokens that are run.
        random: instead of it, a preset name, config file, folder or Hub id whose shape gets random weights.
        sparsities: model sparsities in [0, 1).
        device: `auto`, `cpu`, `cuda` ...
        dtype: `auto` is the stored one (random: bfloat16) on a GPU, float32 on a CPU.
        prompt: tokens of the prompt.
        new: tokens decoded in a round.
        rounds: rounds; every variant runs in each of them.
        compiled: decode through torch.compile with CUDA graphs, dense and sparse; None does so on CUDA.
        bits: quantize the sparse model's sites to 4 or 8 bits, and lm_head to 8; 0 leaves them. A calibrated checkpoint is as
            it is stored.
        group_size: outputs that share a scale at 4 bits.
        seed: of random weights and tokens.
        progress: as `wina_calib.common.bars.hearing` takes it.

    Returns:
        Medians and quartiles; ratios are of neighbouring measurements.

    Raises:
        UsageError: an option is out of range.
        WinaError: the model cannot be loaded or has no sites.

    Example:
        ```python
        print(bench("demo-sparse", sparsities=(0.4, 0.5)).render())
        ```
    """
    _check(model, random, sparsities, prompt, new, rounds)
    place = pick_device(device)
    torch.manual_seed(seed)
    pair = _pair(model, random, place, dtype, seed)
    ids = _tokens(pair, prompt + new, seed).to(place)
    asked = tuple(float(s) for s in sparsities)
    if pair.calibrated and bits:
        raise UsageError(f"{model} is calibrated and is timed as it is stored; leave --bits out.")
    if not pair.calibrated:
        fit(pair, asked, ids, prompt, WeightFormat(bits, group_size) if bits else None)
    use_compile = place.type == "cuda" if compiled is None else compiled
    with hearing(progress) as report:
        return compare(pair, asked, ids, prompt, rounds=rounds, compiled=use_compile, progress=report)


def compare(
    pair: Pair,
    sparsities: Sequence[float],
    ids: Tensor,
    prompt: int,
    *,
    rounds: int,
    compiled: bool,
    groups: Sequence[Sequence[Variant]] | None = None,
    progress: Progress = SILENT,
) -> Bench:
    """Time a pair whose thresholds are set.

    `ids` (1, prompt + new) are tokens on the models' device; `groups` are variants made before by `make_variants`.
    """
    place, new = ids.device, ids.shape[1] - prompt
    real = [achieved(pair, s, ids, prompt) for s in sparsities]
    warn_of_far(sparsities, real)
    roof = copy_bandwidth(place)
    groups = groups or make_variants(pair, sparsities, ids, prompt, compiled=compiled)
    with_onednn = groups[0][0].session.onednn
    stock = None
    if compiled or place.type == "cpu":
        stock = _stock_dense(pair, ids, prompt, new, rounds, with_onednn=with_onednn or not compiled)
    if place.type == "cpu":
        attention.prefer(pair.dense)
        lm_head.prefer(pair.dense)
    measure(groups, new=new, rounds=rounds, progress=progress)
    dense, *sparse = [variant for group in groups for variant in group if not variant.merged]
    merged = [Timing.of(variant.step_ms).median for group in groups for variant in group if variant.merged]
    pair.state.dense = False
    total = (pair.cells.sparse_total + pair.cells.other_decoder + pair.cells.lm_head) * _dtype(pair).itemsize
    # Of 16 bits sparsity 0 keeps weights as the dense model does, whose products read what is dropped.
    fixed = fixed_cost(max(sparse, key=lambda v: v.sparsity or 0.0), prompt, new)
    rows = tuple(_row(v, dense, pair, total, roof, r) for v, r in zip(sparse, real, strict=True))
    return Bench(
        model=pair.name,
        device=device_name(place),
        dtype=str(_dtype(pair)).removeprefix("torch."),
        threads=torch.get_num_threads() if place.type == "cpu" else 0,
        compiled=compiled,
        onednn=with_onednn,
        prompt=prompt,
        new=new,
        rounds=rounds,
        roof_gb_s=roof / 1e9,
        versions=versions(place),
        bits=pair.bits,
        fixed_ms=fixed,
        dense=_dense_row(dense, total, roof, stock, *merged),
        results=rows,
    )


def _check(
    model: str | None, random: str | None, sparsities: Sequence[float], prompt: int, new: int, rounds: int
) -> None:
    if (model is None) == (random is None):
        raise UsageError("give a checkpoint or model, or --random CONFIG for random weights; one of the two.")
    if model is not None and model.lower() in presets():
        raise UsageError(f"{model} is the name of a shape and has no weights here. Time it with --random {model}.")
    check_sparsities(sparsities)
    for name, value in (("prompt", prompt), ("new", new), ("rounds", rounds)):
        if value < 1:
            raise UsageError(f"{name} is {value}; expected at least 1.")


def _pair(model: str | None, random: str | None, place: torch.device, dtype: str, seed: int) -> Pair:
    if random is not None:
        return random_pair(random, device=place, dtype=pick_dtype(dtype, torch.bfloat16, place), seed=seed)
    assert model is not None
    fixed = None if dtype == "auto" and place.type != "cpu" else pick_dtype(dtype, torch.float32, place)
    return open_pair(model, device=place, dtype=fixed)


def _tokens(pair: Pair, count: int, seed: int) -> Tensor:
    """(1, count) token ids: held-out text where there is a tokenizer, else random."""
    limit = getattr(pair.dense.config, "max_position_embeddings", None)
    if limit is not None and count > limit:
        raise UsageError(f"prompt and new tokens are {count} together; the model takes {limit}.")
    if pair.folder is not None:
        try:
            tokenizer = load_tokenizer(pair.folder)
            ids = load_blocks((HELDOUT,), tokenizer, samples=1, seq_len=count, seed=seed, min_tokens=1).ids
            if ids.shape == (1, count):
                return ids
        except WinaError as error:
            logger.info("random tokens are used: %s", error)
    vocabulary = pair.dense.get_input_embeddings().weight.shape[0]
    return torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(seed))


def _stock_dense(pair: Pair, ids: Tensor, prompt: int, new: int, rounds: int, *, with_onednn: bool) -> float:
    """Milliseconds a token of the stock dense model without torch.compile, its attention torch's."""
    variant = Variant(session(pair.dense, ids, prompt, compiled=False), None, PeakMemory(ids.device))
    variant.session.onednn = with_onednn
    measure([[variant]], new=new, rounds=min(rounds, 3))
    return Timing.of(variant.step_ms).median


def _dtype(pair: Pair) -> torch.dtype:
    dtype = pair.dense.get_input_embeddings().weight.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def _dense_row(variant: Variant, total: int, roof: float, stock: float | None, merged: float | None = None) -> Dense:
    step = Timing.of(variant.step_ms)
    return Dense(
        ms_per_token=step.median,
        ms_per_token_spread=step.spread,
        tokens_per_s=1e3 / step.median,
        bytes_per_token=total,
        roof_share=total / (step.median / 1e3) / roof,
        prefill_ms=Timing.of(variant.prefill_ms).median,
        peak_memory_bytes=_memory(variant),
        eager_ms_per_token=stock,
        merged_ms_per_token=merged,
    )


def _row(variant: Variant, dense: Variant, pair: Pair, total: int, roof: float, real: float) -> Sparse:
    assert variant.sparsity is not None
    step = Timing.of(variant.step_ms)
    ratio = Timing.of([d / s for d, s in zip(dense.step_ms, variant.step_ms, strict=True)])
    prefill = Timing.of(variant.prefill_ms).median
    ratios = [s / d for d, s in zip(dense.prefill_ms, variant.prefill_ms, strict=True)]
    read = pair.bytes_read(real)
    fraction = read / total
    return Sparse(
        sparsity=variant.sparsity,
        achieved_sparsity=real,
        read_fraction=fraction,
        limit=1.0 / fraction,
        ms_per_token=step.median,
        ms_per_token_spread=step.spread,
        tokens_per_s=1e3 / step.median,
        speedup=ratio.median,
        speedup_spread=ratio.spread,
        bytes_per_token=read,
        bits_read=pair.bits_read(real),
        roof_share=read / (step.median / 1e3) / roof,
        prefill_ms=prefill,
        prefill_ratio=Timing.of(ratios).median,
        peak_memory_bytes=_memory(variant),
    )


def _memory(variant: Variant) -> int:
    return own_bytes(variant.session.model, variant.session.cache_tensors()) + variant.memory.bytes
