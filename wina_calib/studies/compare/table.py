"""What a comparison found: rows of figures, and the same as text, Markdown and JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from wina_calib.common import plots
from wina_calib.common.text import markdown_table, percent, rise, table

_HEADERS = (
    "method", "budget", "asked", "sparsity", "read", "read, decoder", "bits read", "perplexity", "rise", "KL", "top-1",
    "seconds", "calibration",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One method at one sparsity.

    Attributes:
        method: its name.
        sparsity: model sparsity asked for.
        model_sparsity: achieved, weighted by the sites' sizes, dense first tokens counted in.
        ppl: perplexity.
        dense_ppl: perplexity of the same model at sparsity 0, its transform included and its weights quantized.
        kl: mean KL divergence from that model's prediction, nats a token.
        top1_agreement: share of tokens where both predict the same next token.
        read_fraction: bytes read for a token over the dense model's, lm_head and run-time matrices included.
        read_fraction_decoder: the same without lm_head.
        tokens: predicted tokens.
        seconds: of the evaluation.
        calibration_seconds: of the method's calibration, which serves all its sparsities.
        bits_read: bits of decoder weights read for a token over their number.
        bits_stored: the same at sparsity 0.
        base_ppl: perplexity of the original model; `dense_ppl` where weights are not quantized.
    """

    method: str
    sparsity: float
    model_sparsity: float
    ppl: float
    dense_ppl: float
    kl: float
    top1_agreement: float
    read_fraction: float
    read_fraction_decoder: float
    tokens: int
    seconds: float
    calibration_seconds: float
    bits_read: float
    bits_stored: float
    base_ppl: float

    @property
    def rise(self) -> float:
        """Relative rise of perplexity over the original model's."""
        return self.ppl / self.base_ppl - 1


@dataclass(frozen=True)
class Skipped:
    """A method, or one of its sparsities, that has no row, and why."""

    method: str
    sparsity: float | None
    reason: str


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        model: as given.
        protocol: what all rows share: data, tokens, seed, dtype, versions.
        methods: what the methods are, by name.
        budgets: how each spreads its sparsity over sites, by name.
        rows: in order of methods, then sparsities.
        skipped: what has no row.
    """

    model: str
    protocol: dict[str, Any]
    methods: dict[str, str]
    budgets: dict[str, str]
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...] = ()

    def row(self, method: str, sparsity: float) -> Row:
        """The row of a method at a sparsity; KeyError where there is none."""
        for row in self.rows:
            if (row.method, row.sparsity) == (method, sparsity):
                return row
        raise KeyError((method, sparsity))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"rows": [asdict(row) | {"rise": row.rise} for row in self.rows]}

    def text(self) -> str:
        """A table for a terminal."""
        lines = [[row.method, self.budgets[row.method], *_figures(row)] for row in self.rows]
        shown = [table(_HEADERS, lines)] if lines else []
        return "\n\n".join([self._about(), *shown, *self._unequal(), *self._reasons()])

    def markdown(self) -> str:
        """The rise of perplexity by method and sparsity, all figures, and what the methods are."""
        asked = sorted({row.sparsity for row in self.rows})
        by_cell = {(row.method, row.sparsity): row for row in self.rows}
        names = list(dict.fromkeys(row.method for row in self.rows))
        short = [[f"`{name}`", *(_short(by_cell.get((name, s))) for s in asked)] for name in names]
        full = [[f"`{row.method}`", self.budgets[row.method], *_figures(row)] for row in self.rows]
        parts = [
            self._about(),
            "Rise of perplexity over dense [real model sparsity, read fraction of the decoder]:",
            markdown_table(["method", *(f"asked {s:g}" for s in asked)], short),
            markdown_table(_HEADERS, full),
            *self._unequal(),
            *self._reasons(),
            "\n".join(f"- `{name}`: {self.methods[name]}" for name in names),
        ]
        return "\n\n".join(parts) + "\n"

    def _about(self) -> str:
        p = self.protocol
        dense = f"dense perplexity {self.rows[0].base_ppl:.3f}; " if self.rows else ""
        return (
            f"{self.model}: {dense}calibrated on {p['samples']} blocks of {p['seq_len']} tokens of {', '.join(p['data'])}, "
            f"measured on {p['tokens']:,} tokens of {', '.join(p['heldout'])}; {p['dtype']}, seed {p['seed']}."
        )

    def _unequal(self) -> list[str]:
        """That methods are compared whose sparsity is spread by different rules, where it is so."""
        kinds: dict[str, list[str]] = {}
        for name in dict.fromkeys(row.method for row in self.rows):
            kinds.setdefault(self.budgets[name], []).append(name)
        if len(kinds) < 2:
            return []
        each = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
        return [f"Budgets differ, and are part of what is compared. {each[0].upper()}{each[1:]}."]

    def _reasons(self) -> list[str]:
        return [
            f"{s.method}{'' if s.sparsity is None else f' at {s.sparsity:g}'}: left out. {s.reason}"
            for s in self.skipped
        ]


def _figures(row: Row) -> list[str]:
    return [
        f"{row.sparsity:g}",
        f"{row.model_sparsity:.3f}",
        percent(row.read_fraction),
        percent(row.read_fraction_decoder),
        f"{row.bits_read:.2f}",
        f"{row.ppl:.3f}",
        rise(row.ppl, row.base_ppl),
        f"{row.kl:.3f}",
        percent(row.top1_agreement),
        f"{row.seconds:.0f}",
        f"{row.calibration_seconds:.0f}",
    ]


def _short(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{rise(row.ppl, row.base_ppl)} [{row.model_sparsity:.3f}, {percent(row.read_fraction_decoder, 0)}]"


def draw_comparison(comparison: Comparison) -> bytes:
    """Perplexity, KL divergence and agreement, against model sparsity and against read fraction, as a PNG."""
    names = dict.fromkeys(row.method for row in comparison.rows)
    lines = {name: sorted((r for r in comparison.rows if r.method == name), key=lambda r: r.sparsity) for name in names}
    across = {"model sparsity": "model_sparsity", "read fraction (lm_head included)": "read_fraction"}
    up = {"perplexity": "ppl", "KL, nats a token": "kl", "same most likely token": "top1_agreement"}
    panels = {
        (x, y): {n: [(getattr(r, across[x]), getattr(r, up[y])) for r in rows] for n, rows in lines.items()}
        for y in up
        for x in across
    }
    perplexity, kl, _ = up
    return plots.tradeoffs(
        panels, {perplexity: comparison.rows[0].base_ppl}, comparison.model, logarithmic=(perplexity, kl)
    )


def draw_bits(comparison: Comparison) -> bytes:
    """Rise of perplexity over bits read, a line a method from its point at sparsity 0 on, as a PNG."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in comparison.rows:
        points = lines.setdefault(row.method, [(row.bits_stored, row.dense_ppl / row.base_ppl - 1)])
        points.append((row.bits_read, row.rise))
    return plots.over_bits(lines, comparison.model)
