"""How much thresholds depend on the text they were fitted on: its kind, and how much of it.

The checkpoint's budget and transform stay; thresholds are fitted again in closed loop, in memory, and the model is measured
with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from wina_calib.calibration.fit_thresholds import fit_thresholds
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.options import make_options
from wina_calib.checkpoint.dequantized import weights_of
from wina_calib.checkpoint.local_paths import data_here
from wina_calib.checkpoint.reader import Checkpoint
from wina_calib.common.progress import SILENT, Progress
from wina_calib.common.text import percent, rise, table
from wina_calib.corpus.blocks import Blocks, load_blocks
from wina_calib.model.locate import load_tokenizer
from wina_calib.studies.defaults import DIAGNOSE_AMOUNTS
from wina_calib.studies.diagnose.subject import Subject, Thresholds, put
from wina_calib.studies.evaluate import DRIFT, dense_states, evaluation_blocks, measure

PROSE = ("fiction", "encyclopaedic", "essay", "news")
KINDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "code": (("builtin:code",), ("builtin:heldout:code",)),
    "prose": (tuple(f"builtin:{k}" for k in PROSE), tuple(f"builtin:heldout:{k}" for k in PROSE)),
}
KIND_BLOCKS = 64  # at most, where kinds of text are compared


@dataclass(frozen=True)
class Fitted:
    """Thresholds fitted on some text, measured on another."""

    fitted_on: str  # kind of text, or `calibration text`
    blocks: int  # blocks of it; fewer than asked where there is no more text
    fit_tokens: int  # tokens in these
    tested_on: str  # kind of text, or `held-out text`
    sparsity: float  # model sparsity asked for
    model_sparsity: float  # achieved
    ppl: float  # perplexity
    dense_ppl: float  # perplexity at sparsity 0
    kl: float  # KL divergence from the dense prediction, nats a token
    top1_agreement: float  # share of tokens with the same most likely next token

    @property
    def drifts(self) -> bool:
        """Whether `evaluate` would warn of the achieved sparsity."""
        return abs(self.model_sparsity - self.sparsity) > DRIFT


def reason_without(opened: Checkpoint) -> str | None:
    """Why text makes no difference to a checkpoint's masks; None where it does."""
    if opened.settings.select == "threshold":
        return None
    return "each token keeps its highest scores, whatever text thresholds were fitted on"


def texts(
    subject: Subject,
    sparsity: float,
    *,
    amounts: Sequence[int] = DIAGNOSE_AMOUNTS,
    seq_len: int | None = None,
    progress: Progress = SILENT,
) -> tuple[Fitted, ...]:
    """Fit thresholds on code and on prose and test on both; fit on few and on many blocks of the calibration's text.

    `amounts` are numbers of blocks to fit on, tested on the subject's own; `seq_len` is by default the calibration's.
    """
    facts = subject.opened.settings.provenance
    tokenizer = load_tokenizer(subject.opened.folder)
    length, seed = seq_len or subject.opened.settings.seq_len, int(facts.get("seed", 0))
    most = max(amounts, default=KIND_BLOCKS)
    progress.phase("texts", len(KINDS) + len(amounts))

    def text(specs: Sequence[str], samples: int) -> Blocks:
        return load_blocks(specs, tokenizer, samples=samples, seq_len=length, seed=seed, min_tokens=1)

    tests = {}
    for kind, (_, held) in KINDS.items():
        blocks = evaluation_blocks(held, tokenizer, subject.blocks.tokens, subject.blocks.ids.shape[1])
        tests[kind] = (blocks, dense_states(subject.model, blocks.ids))
    own = (subject.blocks, dense_states(subject.model, subject.blocks.ids)) if amounts else None
    rows: list[Fitted] = []
    for kind, (specs, _) in KINDS.items():
        fitted = text(specs, max(len(specs), min(most, KIND_BLOCKS)))
        thresholds = refitted(subject, fitted, sparsity)
        rows += [_row(subject, kind, fitted, name, test, thresholds, sparsity) for name, test in tests.items()]
        progress.step(kind)
    specs = data_here(facts) or ("builtin",)
    for amount in amounts:
        fitted = text(specs[:amount], amount)
        assert own is not None
        thresholds = refitted(subject, fitted, sparsity)
        rows.append(_row(subject, "calibration text", fitted, "held-out text", own, thresholds, sparsity))
        progress.step(f"{amount} blocks")
    return tuple(rows)


def refitted(subject: Subject, text: Blocks, sparsity: float) -> list[Thresholds]:
    """Thresholds of every site for a model sparsity, fitted on `text` with the checkpoint's budget."""
    opened = subject.opened
    source = weights_of(opened, verified=True)
    loop = str(opened.settings.provenance.get("loop", "closed"))
    options = make_options({"sparsity": sparsity, "grid": (sparsity,), "loop": loop})
    stream = LayerStream.of(source, text.ids, subject.device, subject.dtype)
    budget = opened.sparsities(sparsity)
    tensors = fit_thresholds(stream, opened.settings.rule, options, budget[None])
    return [
        Thresholds(
            float(budget[layer.index, column]),
            {
                group.name: float(tensors[f"{layer.prefix}wina.{site.name}.{group.name}.threshold"])
                for group in opened.settings.rule.groups(site)
            },
        )
        for layer in source.architecture.layers
        for column, site in enumerate(layer.sites)
    ]


def texts_text(rows: Sequence[Fitted]) -> str:
    """Fits as a table for people."""
    headers = ["fitted on", "blocks", "tokens", "tested on", "achieved", "perplexity", "rise", "KL", "top-1"]
    lines = [
        [
            r.fitted_on, str(r.blocks), f"{r.fit_tokens:,}", r.tested_on,
            f"{r.model_sparsity:.3f}{' !' if r.drifts else ''}", f"{r.ppl:.3f}", rise(r.ppl, r.dense_ppl),
            f"{r.kl:.3f}", percent(r.top1_agreement),
        ]
        for r in rows
    ]  # fmt: skip
    remedy = f"\n\n! achieved sparsity is off by more than {DRIFT}. Calibrate on text like that of use, with --data."
    shown = remedy if any(r.drifts for r in rows) else ""
    return f"texts, thresholds for sparsity {rows[0].sparsity:g} fitted again\n\n{table(headers, lines)}{shown}"


def _row(
    subject: Subject,
    kind: str,
    fitted: Blocks,
    name: str,
    test: tuple[Blocks, list[Tensor]],
    thresholds: Sequence[Thresholds],
    sparsity: float,
) -> Fitted:
    put(subject.model, thresholds)
    measured = measure(subject.model, test[0], dense=test[1])
    return Fitted(
        fitted_on=kind,
        blocks=len(fitted.ids),
        fit_tokens=fitted.tokens,
        tested_on=name,
        sparsity=sparsity,
        **measured.figures(),
    )
