"""What a benchmark found, for JSON and for people."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from wina_calib.common.text import percent, table
from wina_calib.quantization.bits import UNQUANTIZED_BITS


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Summarise at least one sample."""
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0])
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(statistics.median(samples), low, high)

    @property
    def spread(self) -> tuple[float, float]:
        """Lower and upper quartile."""
        return self.low, self.high


_SPEEDUP = (
    "speed-up: median over pairs of dense time over sparse time, measured one after the other; on a machine with other work "
    "it is not the ratio of the two medians in ms"
)


@dataclass(frozen=True)
class Dense:
    """The dense model's costs."""

    ms_per_token: float  # median over chunks of decode steps
    ms_per_token_spread: tuple[float, float]  # quartiles
    tokens_per_s: float  # decode speed
    bytes_per_token: int  # weights read for a token, lm_head included, keys and values not
    roof_share: float  # those bytes over the time, as a share of the measured copy bandwidth
    prefill_ms: float  # median time of the prompt
    peak_memory_bytes: int  # weights, cache and what a run adds to them at its peak
    # of the stock model as it is, where `ms_per_token` is of a faster one: compiled, or on a CPU, where it has this
    # package's attention and may do without oneDNN
    eager_ms_per_token: float | None = None
    # of the compiled dense model with one product a site, as the sparse one has: what is left of the speed-up against
    # it is due to skipped weights alone
    merged_ms_per_token: float | None = None


@dataclass(frozen=True)
class Sparse:
    """The sparse model's costs at one sparsity; fields of the same name are as in `Dense`."""

    sparsity: float  # model sparsity asked for
    achieved_sparsity: float  # that of the decode steps measured
    # bytes of weights read over the dense model's at the achieved sparsity, lm_head and run-time matrices included
    read_fraction: float
    limit: float  # 1 / read_fraction, the speed-up if only bytes counted
    ms_per_token: float
    ms_per_token_spread: tuple[float, float]
    tokens_per_s: float
    speedup: float  # median over chunks of dense time over sparse time, each chunk beside its own dense one
    speedup_spread: tuple[float, float]  # quartiles
    bytes_per_token: int
    bits_read: float  # bits of decoder weight read for a token over the number of decoder weights, scales counted
    roof_share: float
    prefill_ms: float
    prefill_ratio: float  # time of the prompt over the dense model's
    peak_memory_bytes: int


@dataclass(frozen=True)
class Bench:
    """Dense against sparse decoding of one model in one process."""

    model: str  # as given
    device: str  # its name
    dtype: str  # of the weights
    threads: int  # CPU threads; 0 on other devices
    compiled: bool  # whether decode steps ran through torch.compile
    # False where decode steps of all variants ran with torch's own products (`torch.backends.mkldnn` off), since the
    # dense model is faster so
    onednn: bool
    prompt: int  # tokens of the prompt
    new: int  # tokens decoded in a round
    rounds: int  # number of rounds
    roof_gb_s: float  # measured copy bandwidth, 1e9 bytes a second, bytes read and written counted
    versions: dict[str, str]  # of torch, transformers, triton and the driver, as far as they matter here
    bits: int  # of a weight of the sparse model's sites; 16 where they are not quantized
    # milliseconds of a token of the sparse model with all inputs of its sites dropped: lm_head, and what is no product
    fixed_ms: float
    dense: Dense  # the dense model
    results: tuple[Sparse, ...]  # the sparse model, one a sparsity

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def render(self) -> str:
        """For people."""
        dense = self.dense
        rows = [["dense", *_costs(dense), "", "", "", f"{dense.prefill_ms:.1f}", _size(dense.peak_memory_bytes)]]
        rows += [
            [
                f"{percent(row.sparsity)} (real {percent(row.achieved_sparsity)})",
                *_costs(row),
                f"{row.bits_read:.3g}",
                f"{row.speedup:.2f}",
                f"{row.limit:.2f}",
                f"{row.prefill_ms:.1f}",
                _size(row.peak_memory_bytes),
            ]
            for row in self.results
        ]
        headers = [
            "", "ms/token", "quartiles", "tokens/s", "GB/token", "of roof", "bits read", "speed-up", "limit", "prefill",
            "memory",
        ]  # fmt: skip
        stock = "without it" if self.compiled else "as transformers runs it"
        others = {stock: dense.eager_ms_per_token, "with one product a site": dense.merged_ms_per_token}
        eager = "".join(f"; dense {name} {ms:.3f} ms/token" for name, ms in others.items() if ms is not None)
        kind = "" if self.bits == UNQUANTIZED_BITS else f"; sparse: {self.bits}-bit weights"
        return (
            f"{self.model} on {_where(self.device, self.threads)}, {self.dtype}, "
            f"{self.prompt} prompt and {self.new} new tokens, {self.rounds} rounds, copy roof {self.roof_gb_s:.1f} GB/s"
            f"{', torch.compile' if self.compiled else ''}{_products(self.onednn)}{eager}{kind}\n\n{table(headers, rows)}\n\n"
            f"{_SPEEDUP}. limit: the speed-up if only weight bytes counted, lm_head included. prefill in ms. "
            f"With all inputs dropped a token takes {self.fixed_ms:.3f} ms."
        )


@dataclass(frozen=True)
class Products:
    """The site products of one decoder layer alone, dense against sparse."""

    model: str  # as given
    device: str  # its name
    dtype: str  # of the weights
    threads: int  # CPU threads; 0 on other devices
    onednn: bool  # as in `Bench`
    layers: int  # layers with weights of their own that a measurement runs through, so that caches do not serve them
    roof_gb_s: float  # measured copy bandwidth, 1e9 bytes a second
    versions: dict[str, str]  # as in `Bench`
    dense: dict[str, Any]  # `{"ms_per_layer", "ms_per_layer_spread", "bytes_per_layer", "roof_share"}`
    # the same a sparsity, with `sparsity`, `achieved_sparsity`, `read_fraction`, `speedup`, `speedup_spread`
    results: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def render(self) -> str:
        """For people."""

        def line(name: str, row: dict[str, Any], speedup: str, limit: str) -> list[str]:
            low, high = row["ms_per_layer_spread"]
            share = percent(row["roof_share"])
            return [name, f"{row['ms_per_layer']:.4f}", f"{low:.4f}-{high:.4f}", share, speedup, limit]

        rows = [line("dense", self.dense, "", "")]
        for row in self.results:
            name = f"{percent(row['sparsity'])} (real {percent(row['achieved_sparsity'])})"
            rows.append(line(name, row, f"{row['speedup']:.2f}", f"{1 / max(row['read_fraction'], 1e-9):.2f}"))
        return (
            f"site products of a layer of {self.model} on {_where(self.device, self.threads)}, {self.dtype}, "
            f"copy roof {self.roof_gb_s:.1f} GB/s{_products(self.onednn)}\n\n"
            f"{table(['', 'ms/layer', 'quartiles', 'of roof', 'speed-up', 'limit'], rows)}\n\n{_SPEEDUP}."
        )


def _costs(row: Dense | Sparse) -> list[str]:
    low, high = row.ms_per_token_spread
    return [
        f"{row.ms_per_token:.3f}",
        f"{low:.3f}-{high:.3f}",
        f"{row.tokens_per_s:.1f}",
        f"{row.bytes_per_token / 1e9:.3g}",
        percent(row.roof_share),
    ]


def _products(with_onednn: bool) -> str:
    return "" if with_onednn else ", decoded with oneDNN off, as dense is faster so"


def _where(device: str, threads: int) -> str:
    return f"{device} ({threads} threads)" if threads else device


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
