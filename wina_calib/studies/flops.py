"""What a token costs: the papers' GFLOPs, and beside them what those leave out. From a config alone, no weights.

The papers count the linear layers and lm_head, one multiply-add as 1, and make lm_head dense at every sparsity. They leave out
the embedding, norms, attention over the context, and the matrices that their transform adds at run time.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from wina_calib.budgets import Cells
from wina_calib.budgets.count import count_cells
from wina_calib.common.text import first_line, percent, table
from wina_calib.errors import ModelFolderError, UsageError
from wina_calib.model import no_folder
from wina_calib.model.architecture import Architecture
from wina_calib.model.folder import CONFIG_BYTES, calibration_of, load_config, open_config
from wina_calib.model.loading import describe_config
from wina_calib.model.locate import DEMO, demo_folder
from wina_calib.storage import read_json
from wina_calib.studies.defaults import FLOPS_CONTEXT, FLOPS_SPARSITIES
from wina_calib.transforms import plan

CONVENTION = "linear layers and a dense lm_head, a multiply-add counts 1; no embedding, attention or run-time matrices"
_PRESETS = Path(__file__).parent.parent / "data" / "presets.json"
_GIGA = 1e9


@dataclass(frozen=True)
class FlopsRow:
    """Costs of one token at one model sparsity."""

    sparsity: float  # model sparsity, the weight-averaged share of inputs that are dropped
    gflops: float  # 1e9 multiply-adds of linear layers and lm_head, as the papers count
    reduction: float  # share of the dense model's `gflops` that is saved
    runtime_matrix_gflops: float  # multiply-adds of the matrices that the transform adds at run time
    attention_gflops: float  # multiply-adds of query-key and probability-value products at the context length
    total_gflops: float  # all three together
    total_reduction: float  # share saved of what the dense model needs for linear layers, lm_head and attention
    read_fraction: float  # weights read over the dense model's, lm_head and run-time matrices included
    read_fraction_decoder: float  # the same without lm_head
    gigabytes_read: float  # 1e9 bytes of weights read
    cache_gigabytes: float  # 1e9 bytes of keys and values read at the context length


@dataclass(frozen=True)
class FlopsTable:
    """Costs of one token at several sparsities."""

    model: str  # name as given
    transform: str  # resolved transform
    context: int  # tokens that attention looks at
    dtype: str  # dtype that bytes are counted in
    dense_gflops: float  # the dense model, as the papers count
    rows: tuple[FlopsRow, ...]  # one a sparsity, in the order asked
    convention: str = CONVENTION  # how `gflops` is counted

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def flops(
    model_or_config: str,
    *,
    sparsities: Sequence[float] = FLOPS_SPARSITIES,
    transform: str | None = None,
    context: int = FLOPS_CONTEXT,
    revision: str | None = None,
) -> FlopsTable:
    """Count what a token costs at several sparsities.

    Args:
        model_or_config: a preset name (`presets()`), `demo`, a config file, a model folder or a Hub id.
        sparsities: model sparsities in [0, 1).
        transform: name of the transform; None is the calibrated checkpoint's own, or "none".
        context: tokens that attention looks at, the new one counted.
        revision: branch, tag or commit on the Hub.

    Raises:
        UsageError: the name is not known, or a sparsity or the context is out of range.
        ModelFolderError: the config cannot be read.
        UnsupportedModel: the config's model has no sparse sites.

    Example:
        ```python
        wina_calib.studies.flops.flops("llama-2-7b").rows[-1].gflops  # 2.40
        ```
    """
    check_sparsities(sparsities)
    if context < 1:
        raise UsageError(f"context is {context}; expected at least 1 token.")
    config = find_config(model_or_config, revision=revision)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16  # describing changes config.dtype
    arch = describe_config(config)
    name = plan(transform or str((calibration_of(config) or {}).get("transform", "none")), arch).name
    reach = _reach(config, len(arch.layers), context)
    cells = count_cells(arch, name)
    rows = tuple(_row(float(s), arch, cells, reach, dtype.itemsize) for s in sparsities)
    dense = (cells.sparse_total + cells.lm_head) / _GIGA
    return FlopsTable(model_or_config, name, context, str(dtype).removeprefix("torch."), dense, rows)


def check_sparsities(sparsities: Sequence[float]) -> None:
    """Raise UsageError unless there are sparsities and all are in [0, 1)."""
    wrong = [s for s in sparsities if not 0.0 <= s < 1.0]
    if wrong or not sparsities:
        raise UsageError(f"sparsity is {', '.join(map(str, wrong)) or 'empty'}; expected numbers in [0, 1).")


def _row(sparsity: float, arch: Architecture, cells: Cells, reach: Sequence[int], itemsize: int) -> FlopsRow:
    dense = (cells.sparse_total + cells.lm_head) / _GIGA
    gflops = (cells.sparse_total * (1.0 - sparsity) + cells.lm_head) / _GIGA
    runtime = cells.runtime_matrices / _GIGA
    attention = sum(2 * layer.heads * layer.head_dim * n for layer, n in zip(arch.layers, reach, strict=True)) / _GIGA
    cached = sum(2 * layer.kv_heads * layer.head_dim * n for layer, n in zip(arch.layers, reach, strict=True))
    total = gflops + runtime + attention
    dense_weights = cells.sparse_total + cells.other_decoder + cells.lm_head
    read_fraction = cells.read_fraction_at(sparsity)
    return FlopsRow(
        sparsity=sparsity,
        gflops=gflops,
        reduction=1.0 - gflops / dense,
        runtime_matrix_gflops=runtime,
        attention_gflops=attention,
        total_gflops=total,
        total_reduction=1.0 - total / (dense + attention),
        read_fraction=read_fraction,
        read_fraction_decoder=cells.read_fraction_at(sparsity, lm_head=False),
        gigabytes_read=read_fraction * dense_weights * itemsize / _GIGA,
        cache_gigabytes=cached * itemsize / _GIGA,
    )


def render(result: FlopsTable) -> str:
    """The costs as text."""
    rows = [
        [
            f"{100 * row.sparsity:g} %",
            _figure(row.gflops),
            percent(row.reduction),
            _figure(row.runtime_matrix_gflops),
            _figure(row.attention_gflops),
            percent(row.total_reduction),
            percent(row.read_fraction),
            percent(row.read_fraction_decoder),
            _figure(row.gigabytes_read),
        ]
        for row in result.rows
    ]
    headers = [
        "sparsity", "GFLOPs", "saved", "+ run-time", "+ attention", "saved of all", "read", "read, decoder", "GB read",
    ]  # fmt: skip
    return (
        f"{result.model}: {_figure(result.dense_gflops)} GFLOPs a token, dense; transform {result.transform}\n\n"
        f"{table(headers, rows)}\n\n"
        f"GFLOPs as the papers count: {result.convention}. Attention at {result.context:,} tokens, whose keys and values are "
        f"{_figure(result.rows[0].cache_gigabytes)} GB more. Bytes in {result.dtype}. "
        "`read` counts lm_head and run-time matrices in."
    )


def _figure(value: float) -> str:
    """Two decimals, or three digits where those would hide a small model's costs."""
    return f"{value:.2f}" if value == 0 or value >= 0.1 else f"{value:.3g}"


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Configs that are known by name, without weights."""
    raw = read_json(_PRESETS, max_bytes=CONFIG_BYTES)
    assert isinstance(raw, dict)
    return raw


def find_config(name: str, *, revision: str | None = None) -> PreTrainedConfig:
    """Find a config by preset name, `demo`, path or Hub id; from the Hub only config.json is fetched.

    Raises:
        UsageError: nothing has this name; the message gives the nearest known ones.
        ModelFolderError: the config cannot be fetched or read.
    """
    if name.lower() in presets():
        return AutoConfig.for_model(**presets()[name.lower()])
    if name == DEMO:
        return load_config(demo_folder())
    path = Path(name).expanduser()
    if path.is_dir():
        return load_config(path)
    if path.is_file() and path.suffix != ".gguf":
        opened = open_config(path)
        if "model_type" not in opened.stored and not opened.is_reference:
            raise ModelFolderError(f"{path} is no model config: it has no model_type.")
        return opened.config
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return load_config(_fetch(name, revision).parent)
    known = [DEMO, *presets()]
    if (told := no_folder.reason(name)) is not None:
        raise ModelFolderError(told)
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    raise UsageError(
        f"{name!r} is no preset, file, folder or Hub id. {'Nearest known' if near else 'Known'}: {', '.join(near or known)}."
    )


def _fetch(repo: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, "config.json", revision=revision))
    except Exception as error:
        raise ModelFolderError(
            f"config.json of {repo} could not be fetched from the Hub ({first_line(error)}). Check the name, the network and, "
            "for private or gated models, `hf auth login`; or give a config file."
        ) from error


def _reach(config: PreTrainedConfig, layers: int, context: int) -> list[int]:
    """Tokens that each layer's attention looks at: the context, or its sliding window where that is shorter."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) or context
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * layers
    return [min(context, window) if kind == "sliding_attention" else context for kind in kinds]
