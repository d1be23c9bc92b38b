"""The two models of a benchmark: a stock dense one, and a sparse one that shares everything but the sites' weights."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from wina_calib.budgets import Cells
from wina_calib.budgets.count import count_cells
from wina_calib.checkpoint.reader import open_any
from wina_calib.checkpoint.settings import Settings
from wina_calib.masks.histogram import ScoreHistogram
from wina_calib.masks.score import scores
from wina_calib.masks.thresholds import LEVELS
from wina_calib.model.architecture import Architecture, describe
from wina_calib.model.loading import language_model, meta_model
from wina_calib.model.locate import resolve
from wina_calib.model.source import load_whole, source_of
from wina_calib.model.tensor_names import is_added
from wina_calib.quantization.bits import UNQUANTIZED_BITS, bits_read
from wina_calib.quantization.formats import Quantized, WeightFormat, quantize_rows
from wina_calib.quantization.scales import quantize_nearest
from wina_calib.runtime.insert_sites import insert_sites
from wina_calib.runtime.load import choose_sparsity, load_opened, sparse_sites
from wina_calib.runtime.modules import SiteState, SparseLinear
from wina_calib.runtime.quantized import QuantizedEmbedding, QuantizedHead, QuantizedLinear
from wina_calib.runtime.state import RuntimeState
from wina_calib.studies.flops import find_config

INITIAL_STD = 0.02
# Inputs, or rows of lm_head, that are quantized at a time.
QUANTIZED_INPUTS = 1024


@dataclass(frozen=True)
class Pair:
    """A dense and a sparse model with the same weights."""

    name: str  # as the user gave it
    dense: PreTrainedModel  # stock transformers model, row-major weights
    # the same with sparse sites; embedding, norms and lm_head are the dense model's own tensors
    sparse: PreTrainedModel
    cells: Cells  # element counts for read fractions
    calibrated: bool  # whether thresholds come from a calibration; else `fit` must set them
    folder: Path | None  # where a tokenizer may be; None for random weights

    @property
    def state(self) -> RuntimeState:
        """What the sparse model's sites share."""
        return sparse_sites(self.sparse)[0].state

    @property
    def itemsize(self) -> int:
        """Bytes of a weight of the dense model."""
        size: int = self.dense.get_input_embeddings().weight.itemsize
        return size

    @property
    def bits(self) -> int:
        """Of a weight of the sparse model's sites, scales not counted."""
        return sparse_sites(self.sparse)[0].settings.bits

    def bits_read(self, sparsity: float) -> float:
        """Bits of decoder weight read for a token at a model sparsity over the number of decoder weights, scales counted."""
        plain = 8 * self.itemsize
        return bits_read(
            (s.site.weights, plain if s.format is None else s.format.bits_a_weight(outs), sparsity)
            for s in sparse_sites(self.sparse)
            for outs in [[p.out_features for p in s.site.projections]]
        )

    def bytes_read(self, sparsity: float) -> int:
        """Bytes of weights that the sparse model reads for a token at a model sparsity, lm_head included."""
        cells, itemsize = self.cells, self.itemsize
        if self.bits == UNQUANTIZED_BITS:
            total = (cells.sparse_total + cells.other_decoder + cells.lm_head) * itemsize
            return round(total * cells.read_fraction_at(sparsity))
        head = self.sparse.get_output_embeddings()
        at_head = cells.lm_head * itemsize
        if isinstance(head, QuantizedHead):
            at_head = head.quantized.codes.nbytes + head.quantized.scales.nbytes
        return round(cells.sparse_total * self.bits_read(sparsity) / 8) + cells.other_decoder * itemsize + at_head


def open_pair(model: str, *, device: torch.device, dtype: torch.dtype | None) -> Pair:
    """Load a calibrated checkpoint or a plain model twice.

    `dtype` None is that on disk.

    Raises:
        WinaError: it cannot be loaded or has no sites.
    """
    folder, _ = resolve(model)
    opened = open_any(folder)
    if opened.is_calibrated:
        place = None if device.type == "cpu" else device
        sparse = load_opened(opened, dtype=dtype or "auto", device_map=place).eval()
        settings = sparse_sites(sparse)[0].settings
        dense = stock_twin(sparse, opened.config)
        return Pair(model, dense, sparse, count_cells(describe(dense), settings.transform), True, folder)
    source = source_of(opened, model)
    loaded = load_whole(source, dtype or source.dtype).to(device)
    return _with_sites(model, loaded, source.config, source.folder)


def random_pair(name: str, *, device: torch.device, dtype: torch.dtype, seed: int) -> Pair:
    """Random weights of a config, made on the device."""
    config = language_model(find_config(name)).config
    return _with_sites(name, random_model(config, device, dtype, seed), config, None)


def random_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """A stock model with normal weights, norm gains 1 and biases 0."""
    model = meta_model(config, dtype)
    generator = torch.Generator(device=device).manual_seed(seed)
    std = float(getattr(config, "initializer_range", INITIAL_STD) or INITIAL_STD)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                value = torch.empty(parameter.shape, dtype=dtype, device=device)
                if value.ndim > 1:
                    value.normal_(0.0, std, generator=generator)
                else:
                    value.fill_(0.0 if name == "bias" else 1.0)
                made[id(parameter)] = nn.Parameter(value, requires_grad=False)
            setattr(module, name, made[id(parameter)])
    model.tie_weights()
    return model.to(device).eval()


def stock_twin(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A stock model of `config` with its own row-major copies of the sites' weights, sharing all else with `model`.

    The model is not packed yet; the config is of the base model's type, without quantization.
    """
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = model.get_input_embeddings().weight.dtype
    twin = meta_model(copy.deepcopy(config), dtype)
    own = {layer.prefix + p.module + ".weight" for layer, site in describe(twin).sites for p in site.projections}
    shapes = {name: tensor.shape for name, tensor in twin.state_dict().items()}
    state = {
        name: tensor.clone(memory_format=torch.contiguous_format) if name in own else tensor.view(shapes[name])
        for name, tensor in _plain_weights(model).items()
    }
    twin.load_state_dict(state, strict=True, assign=True)
    twin.tie_weights()
    twin.requires_grad_(False)
    return twin.to(model.device).eval()


def _plain_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's tensors as the base model names them, quantized ones dequantized."""
    found = {name: tensor for name, tensor in model.state_dict().items() if not is_added(name)}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedHead | QuantizedEmbedding):
            for part in ("codes", "scales"):
                found.pop(f"{name}.{part}", None)
            found[f"{name}.weight"] = module.weight.as_subclass(Tensor)
    return found


def _with_sites(name: str, dense: PreTrainedModel, config: PreTrainedConfig, folder: Path | None) -> Pair:
    sparse = stock_twin(dense, config)
    arch = describe(sparse)
    return Pair(name, dense, sparse, count_cells(arch, "none"), False, folder)


def fit(pair: Pair, sparsities: tuple[float, ...], ids: Tensor, first: int, form: WeightFormat | None = None) -> None:
    """Give an uncalibrated pair's sparse model thresholds that meet the sparsities, all sites alike.

    One forward pass a sparsity: each site's threshold is the quantile of the scores that it sees, set before it
    computes, so that the sites after it are fitted to what it produces.

    Args:
        pair: from `random_pair` or `open_pair` on a plain model.
        sparsities: model sparsities to be fitted.
        ids: (1, tokens) of prompt and continuation.
        first: position from which inputs count, the first to be decoded.
        form: how the sparse model's weights are quantized, rounded to nearest; random ones get random codes. lm_head is
            then int8. None leaves all as it is.
    """
    anchors = tuple(sorted({s for s in sparsities if s > 0})) or (0.5,)
    settings = Settings(sparsity=anchors[0], anchors=anchors)
    if form is not None:
        settings = replace(
            settings, bits=form.bits, group_size=form.group_size, zero_point=form.zero_point, head_bits=8
        )
    arch = describe(pair.sparse)
    insert_sites(pair.sparse, arch, settings)
    sites = sparse_sites(pair.sparse)
    if form is not None:
        _quantize(pair, arch, sites, form)
    for site in sites:
        site.budget.copy_(torch.tensor(anchors))
        for group in site.groups:
            state = site.group(group.name)
            if form is not None and pair.folder is None:
                continue  # all columns of random codes are alike
            weights = [linear.weight for linear in site.linears if linear.group == group.name]
            state.norm.copy_(settings.rule.norm(group, weights))
    for i, sparsity in enumerate(anchors):
        with ExitStack() as hooks, torch.no_grad():
            for site in sites:
                for linear in filter(lambda linear: linear.leads, site.linears):
                    hooks.enter_context(linear.register_forward_pre_hook(_Fit(site, i, sparsity, first)))
            pair.sparse(ids, use_cache=False, logits_to_keep=1)
    choose_sparsity(pair.sparse, anchors[0])


@torch.no_grad()
def _quantize(pair: Pair, arch: Architecture, sites: list[SiteState], form: WeightFormat) -> None:
    """Fill the sparse model's codes from the dense model's weights, or at random where these are."""
    generator = torch.Generator(pair.dense.device).manual_seed(0)
    for site in sites:
        layer = pair.dense.get_submodule(f"{arch.layers_path}.{site.layer}")
        for group in site.groups:
            weights = [layer.get_submodule(p.module).get_parameter("weight") for p in group.projections]
            own = site.group(group.name).quantized
            if pair.folder is None:
                _fill(own, float(weights[0].std()), generator)
                continue
            together = own.width if form.bits == 8 else QUANTIZED_INPUTS  # an output's scale at 8 bits is of all inputs
            for inputs in torch.arange(own.width).split(together):
                made = quantize_nearest(torch.cat([w[:, inputs].t() for w in weights], dim=1), form)
                for name, tensor in made.named().items():
                    part = own.named()[name]
                    (part if part.ndim == 1 else part[inputs[0] : inputs[-1] + 1]).copy_(tensor)
    head = pair.sparse.get_submodule(arch.lm_head)
    assert isinstance(head, QuantizedHead)
    rows, weight = head.quantized, pair.dense.get_submodule(arch.lm_head).get_parameter("weight")
    for start in range(0, len(rows.scales), QUANTIZED_INPUTS):
        made_rows = quantize_rows(weight[start : start + QUANTIZED_INPUTS])
        rows.codes[start : start + QUANTIZED_INPUTS] = made_rows.codes
        rows.scales[start : start + QUANTIZED_INPUTS] = made_rows.scales


def _fill(quantized: Quantized, deviation: float, generator: torch.Generator) -> None:
    """Random codes, with scales that give them this standard deviation and zeros in their middle."""
    high, spread = (256, 15 / 12**0.5) if quantized.format.bits == 4 else (255, 254 / 12**0.5)
    codes = quantized.codes.view(torch.uint8)
    codes.random_(0, high, generator=generator)
    if quantized.format.bits == 8:
        codes.add_(129)  # from -127 on
    quantized.scales.fill_(deviation / spread)
    if quantized.zeros is not None:
        quantized.zeros.fill_(0x88)


@dataclass(frozen=True)
class _Fit:
    """Sets a site's quantile table and threshold from the input that it is about to see."""

    site: SiteState
    anchor: int
    sparsity: float
    first: int

    def __call__(self, module: SparseLinear, args: tuple[Tensor, ...]) -> None:
        (x,) = args
        for group in self.site.groups:
            state = self.site.group(group.name)
            seen = ScoreHistogram(x.device)
            seen.update(scores(x[:, self.first :], state.norm, self.site.settings.score))
            state.table[self.anchor] = seen.quantiles(LEVELS).float().to(x.device)
            state.threshold.fill_(float(seen.quantiles(torch.tensor([self.sparsity]))[0]))


def own_bytes(model: nn.Module, extra: tuple[Any, ...] = ()) -> int:
    """Bytes of a model's weights and buffers, and of `extra` tensors; shared memory counts once."""
    tensors = [*model.parameters(), *model.buffers(), *extra]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
