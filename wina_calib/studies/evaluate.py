"""What sparsity costs in quality: a calibrated checkpoint against itself at sparsity 0, on text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from wina_calib.calibration.layer_stream import Head
from wina_calib.calibration.likelihood import Quality, quality_sums, standard_error
from wina_calib.checkpoint.format import stored_cells
from wina_calib.checkpoint.local_paths import data_here
from wina_calib.checkpoint.reader import open_calibrated
from wina_calib.checkpoint.settings import Settings
from wina_calib.checkpoint.verdict import HELD_OUT, HeldOut
from wina_calib.common.bars import Hearing, hearing
from wina_calib.common.devices import pick_device, pick_dtype
from wina_calib.common.progress import SILENT, Estimate, Part, Progress
from wina_calib.corpus.blocks import Blocks, data_for, load_blocks, text_hashes
from wina_calib.corpus.sources import EVALUATED_TOKENS, Data, data_specs, is_local
from wina_calib.errors import NumericError, UsageError
from wina_calib.model.architecture import SITES, describe
from wina_calib.model.folder import ModelFolder
from wina_calib.model.locate import load_tokenizer, resolve
from wina_calib.runtime.load import choose_sparsity, load_opened, runtime_state, sparse_sites
from wina_calib.runtime.modules import SiteState, model_weighted
from wina_calib.runtime.state import SiteCount

DRIFT = 0.02
FEW_TOKENS = 1000
_ROWS = 256


@dataclass(frozen=True)
class SiteSparsity:
    """Asked and achieved sparsity of one site."""

    layer: int
    site: str
    asked: float
    achieved: float


@dataclass(frozen=True)
class Evaluation:
    """Quality of a checkpoint at one sparsity.

    Attributes:
        sparsity: model sparsity asked for.
        model_sparsity: achieved, weighted by the sites' sizes, the first tokens' dense rows counted in.
        dense_ppl: perplexity of the checkpoint at sparsity 0.
        sparse_ppl: perplexity at the sparsity.
        base_ppl: perplexity of the original model, stored by calibration, and on what it was measured.
        base_ppl_comparable: whether that were the very tokens that `dense_ppl` is of.
        kl: mean KL divergence of the sparse from the dense prediction, nats a token.
        top1_agreement: share of tokens where both predict the same next token.
        read_fraction: bytes read for a token over the dense model's, lm_head and run-time matrices included.
        read_fraction_decoder: the same without lm_head.
        bits_read: bits of decoder weights read for a token over their number.
        bits_stored: the same at sparsity 0: 16 where weights are not quantized and no matrices are added.
        tokens: predicted tokens.
        sites: asked and achieved sparsity of every site.
        warnings: what makes these figures doubtful, with the remedy.
        weights: `int4` or `int8` where weights are quantized, so that `dense_ppl` is theirs and not the original model's.
        rise_error: standard error of `sparse_ppl` over `dense_ppl`, by how blocks differ; None of one block.
        quantizing_rise: what quantizing them cost in perplexity on calibration's held-out text, over the original model.
    """

    sparsity: float
    model_sparsity: float
    dense_ppl: float
    sparse_ppl: float
    base_ppl: float
    base_ppl_data: str
    base_ppl_comparable: bool
    kl: float
    top1_agreement: float
    read_fraction: float
    read_fraction_decoder: float
    bits_read: float
    bits_stored: float
    tokens: int
    data: tuple[str, ...]
    sites: tuple[SiteSparsity, ...]
    warnings: tuple[str, ...]
    weights: str | None = None
    rise_error: float | None = None
    quantizing_rise: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Measured(Quality):
    """Quality of a sparse model on some blocks; figures as in `Evaluation`, `sites` achieved ones by (layer, site)."""

    model_sparsity: float
    sites: dict[tuple[int, str], float]
    rise_error: float | None = None  # standard error of `rise`; None where it is not known

    @classmethod
    def from_sums(
        cls,
        sums: Tensor,
        counts: Mapping[tuple[int, str], SiteCount],
        sites: Sequence[SiteState],
        blocks: Blocks,
        rises: Sequence[Tensor] = (),
    ) -> Measured:
        """From `block_sums` and mask counts over all of `blocks`, and the rise of the loss in each."""
        achieved = {(s.layer, s.site.name): counts[s.layer, s.site.name].sparsity for s in sites}
        quality = Quality.of(sums, blocks.tokens - len(blocks.ids))
        error = standard_error(torch.stack(list(rises))) if rises else None
        return cls(
            **vars(quality),
            model_sparsity=model_weighted(sites, list(achieved.values())),
            sites=achieved,
            rise_error=None if error is None else error * (1 + quality.rise),
        )

    def figures(self) -> dict[str, float]:
        """What rows of every experiment have, by name."""
        return {
            "model_sparsity": self.model_sparsity,
            "ppl": self.ppl,
            "dense_ppl": self.dense_ppl,
            "kl": self.kl,
            "top1_agreement": self.top1_agreement,
        }


def evaluate(
    path_or_repo: str | Path,
    *,
    data: Data = None,
    sparsity: float | None = None,
    tokens: int = EVALUATED_TOKENS,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    progress: Hearing = None,
) -> Evaluation:
    """Measure a calibrated checkpoint against itself at sparsity 0.

    Args:
        path_or_repo: checkpoint folder or Hub id.
        data: data specs, as for `calibrate`; by default the built-in held-out text, as `calibrate` measures on.
        sparsity: model sparsity; None is the one it was calibrated for.
        tokens: tokens to use, in blocks of the calibration's length.
        device: compute device.
        dtype: compute dtype; `auto` is the stored one on a GPU and float32 on a CPU.
        revision: branch, tag or commit on the Hub.
        progress: as `wina_calib.common.bars.hearing` takes it: True for a bar, or a function that is told the blocks done and
            the blocks in all.

    Raises:
        WinaError: the checkpoint or the text cannot be used.
    """
    opened = open_calibrated(resolve(path_or_repo, revision=revision)[0])
    place = pick_device(device)
    with hearing(progress) as report:
        return evaluate_model(
            load_on(opened, place, dtype), opened, data_specs(data), sparsity=sparsity, tokens=tokens, progress=report
        )


def evaluate_model(
    model: PreTrainedModel,
    folder: Path | ModelFolder,
    data: tuple[str, ...] = (),
    *,
    sparsity: float | None = None,
    tokens: int = EVALUATED_TOKENS,
    progress: Progress = SILENT,
    budget: NDArray[np.float64] | None = None,
) -> Evaluation:
    """Measure a loaded sparse model; see `evaluate`. `budget` (layers, sites) replaces the stored site sparsities."""
    if tokens < 2:
        raise UsageError(f"tokens is {tokens}; expected at least 2.")
    sites = sparse_sites(model)
    settings = sites[0].settings
    asked = settings.sparsity if sparsity is None else sparsity
    choose_sparsity(model, asked)
    if budget is not None:
        set_budget(model, asked, budget)
    blocks = evaluation_blocks(data, load_tokenizer(folder), tokens, settings.seq_len)
    progress.planned(Estimate((Part("evaluate", len(blocks.ids)),)))
    progress.phase("evaluate", len(blocks.ids))
    measured = measure(model, blocks, progress)
    arch, provenance = describe(model), settings.provenance
    held = HeldOut.from_dict(provenance.get(HELD_OUT))
    cells = stored_cells(arch, settings)
    achieved: float | NDArray[np.float64] = measured.model_sparsity
    if cells.site_bits is not None:
        achieved = np.array([[measured.sites[layer.index, site.name] for site in layer.sites] for layer in arch.layers])
    return Evaluation(
        sparsity=asked,
        model_sparsity=measured.model_sparsity,
        dense_ppl=measured.dense_ppl,
        sparse_ppl=measured.ppl,
        base_ppl=float(provenance.get("base_ppl", float("nan"))),
        base_ppl_data=f"{' + '.join(provenance.get('base_ppl_data', []))}, {provenance.get('base_ppl_tokens', 0)} tokens",
        base_ppl_comparable=provenance.get("base_ppl_fingerprint") == blocks.fingerprint,
        kl=measured.kl,
        top1_agreement=measured.top1_agreement,
        read_fraction=cells.read_fraction_at(achieved),
        read_fraction_decoder=cells.read_fraction_at(achieved, lm_head=False),
        bits_read=cells.bits_read_at(achieved),
        bits_stored=cells.bits_read_at(0.0),
        tokens=measured.tokens,
        data=blocks.data,
        sites=tuple(SiteSparsity(s.layer, s.site.name, s.asked, measured.sites[s.layer, s.site.name]) for s in sites),
        warnings=find_warnings(
            settings, blocks.data, asked, measured.model_sparsity, measured.tokens, calibration=data_here(provenance)
        ),
        weights=settings.weights_name,
        rise_error=measured.rise_error,
        quantizing_rise=None if held is None or settings.weights_name is None else held.base_rise,
    )


def measure(
    model: PreTrainedModel, blocks: Blocks, progress: Progress = SILENT, dense: Sequence[Tensor] | None = None
) -> Measured:
    """Measure a loaded sparse model, as its thresholds are set now, against itself at sparsity 0.

    `dense` is what `dense_states` gave for the same blocks, so that they are not computed again.
    """
    sites, totals = sparse_sites(model), torch.zeros(4, dtype=torch.float64)
    rises = []
    with runtime_state(model).counting() as counts:
        for index, ids in enumerate(blocks.ids.to(model.device)):
            whole = dense_states(model, ids[None])[0] if dense is None else dense[index]
            sums = block_sums(model, whole, _states(model, ids), ids)
            totals += sums
            rises.append((sums[1] - sums[0]) / (len(ids) - 1))
            progress.step(f"block {index + 1}")
    return Measured.from_sums(totals, counts, sites, blocks, rises)


def dense_states(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """The decoder's outputs (1, seq - 1, hidden) at sparsity 0 for each block of `ids` (blocks, seq)."""
    with runtime_state(model).densely():
        return [_states(model, row) for row in ids.to(model.device)]


def evaluation_blocks(data: Sequence[str], tokenizer: Any, tokens: int, seq_len: int) -> Blocks:
    """The text that an evaluation reads: about so many tokens, in blocks of at most `seq_len`; see `data_for`."""
    data, length = data_for(tokenizer, data, heldout=True), min(seq_len, tokens)
    samples = max(len(data), tokens // length)  # at least one of each
    return load_blocks(data, tokenizer, samples=samples, seq_len=length, seed=0, min_tokens=2)


@torch.no_grad()
def _states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The decoder's output (1, seq - 1, hidden) for one block (seq,)."""
    found: Tensor = model.get_decoder()(input_ids=ids[None, :-1], use_cache=False).last_hidden_state
    return found


def block_sums(model: PreTrainedModel, dense: Tensor, sparse: Tensor, ids: Tensor) -> Tensor:
    """`quality_sums` of one block `ids` (seq,), by the decoder's outputs (1, seq - 1, hidden) without and with masks.

    Raises:
        NumericError: logits are NaN or infinite.
    """
    head = Head(model, model.get_decoder())
    sums = quality_sums(sparse[0], dense[0], ids[1:], head, head, _ROWS)
    if not bool(torch.isfinite(sums).all()):
        raise NumericError("the model's logits are NaN or infinite. Try --dtype float32.")
    return sums


def find_warnings(
    settings: Settings,
    data: tuple[str, ...],
    asked: float,
    real: float,
    tokens: int,
    *,
    calibration: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """What makes an evaluation doubtful, with the remedy."""
    warnings = []
    if tokens < FEW_TOKENS:
        warnings.append(f"{tokens} tokens are too few to rely on these figures. Give more text, or a larger --tokens.")
    outside = settings.unfitted(asked)
    if outside is not None:
        warnings.append(outside)
    if abs(real - asked) > DRIFT:
        reason = (
            "" if outside else ": this text differs from the calibration's. Calibrate on text like this with --data"
        )
        warnings.append(f"achieved sparsity {real:.3f} is off the asked {asked:.3f} by more than {DRIFT}{reason}.")
    overlap = _overlap(calibration or settings.data, data)
    if overlap > 0.01:
        warnings.append(f"{overlap:.0%} of the text's lines are also in the calibration data: quality is flattered.")
    return tuple(warnings)


def _overlap(calibration: tuple[str, ...], data: tuple[str, ...]) -> float:
    """Share of the longer lines that are in the calibration data too, where both are at hand."""
    local = [s for s in calibration if is_local(s)]
    here = [s for s in data if is_local(s)]
    if not local or not here:
        return 0.0
    mine = text_hashes(here)
    return len(mine & text_hashes(local)) / len(mine) if mine else 0.0


def load_on(opened: ModelFolder, device: torch.device, dtype: str) -> PreTrainedModel:
    """Load a checkpoint to measure it: `auto` is the stored dtype on an accelerator, float32 on a CPU."""
    cpu = device.type == "cpu"
    stored = dtype == "auto" and not cpu
    chosen = "auto" if stored else pick_dtype(dtype, torch.float32, device)
    return load_opened(opened, dtype=chosen, device_map=None if cpu else device)


def set_budget(model: PreTrainedModel, sparsity: float, budget: NDArray[np.float64]) -> None:
    """Run a loaded model at site sparsities `budget` (layers, sites), with the tables of a model sparsity."""
    for site in sparse_sites(model):
        site.set_sparsity(sparsity, float(budget[site.layer, SITES.index(site.site.name)]))
