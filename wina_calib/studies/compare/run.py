"""Methods side by side under one protocol: the same text, the same measurement, one calibration a method.

Each figure is a cell, (method, sparsity), kept as one small file that names everything it depends on. A finished cell is never
computed twice: stopped at any moment, the same call goes on. Under another protocol the old cells stay and count for nothing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wina_calib.budgets import Cells
from wina_calib.budgets.count import count_cells
from wina_calib.calibration.choose_budget import settle
from wina_calib.calibration.cost import CLOSED_LOOP_PASSES, choice_passes
from wina_calib.calibration.dense_pass import dense_pass
from wina_calib.calibration.identity import budget_digest
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.likelihood import Quality, next_token_nll, perplexity
from wina_calib.calibration.options import OPERATIONAL, CalibrateOptions, make_options
from wina_calib.calibration.run import run_calibration
from wina_calib.checkpoint.format import model_names, stored_cells
from wina_calib.common import plots
from wina_calib.common.atomic import lock, readable_errors, write_file
from wina_calib.common.bars import Hearing, hearing
from wina_calib.common.devices import pick_device, pick_dtype
from wina_calib.common.progress import Estimate, Part, Progress, Within
from wina_calib.common.text import finite
from wina_calib.corpus.blocks import Blocks, data_for, load_blocks
from wina_calib.corpus.sources import EVALUATED_TOKENS, Data, data_specs
from wina_calib.errors import UsageError, WinaError
from wina_calib.model.architecture import describe
from wina_calib.model.folder import remote_code
from wina_calib.model.source import Source, fitting_length, load_whole, open_source
from wina_calib.runtime.load import load, set_sparsity, sparse_sites
from wina_calib.studies.compare.cats import fit_gates, gated_share, masked_gates
from wina_calib.studies.compare.finished import FORMAT, finished_seconds, json_bytes, key_digest, read_cell
from wina_calib.studies.compare.methods import Method, find_methods
from wina_calib.studies.compare.table import Comparison, Row, Skipped, draw_bits, draw_comparison
from wina_calib.studies.defaults import COMPARE_METHODS, COMPARE_SPARSITIES
from wina_calib.studies.evaluate import Measured, block_sums, evaluation_blocks, measure
from wina_calib.transforms import needed_sites, plan
from wina_calib.version import versions

_HELD_TOKENS = 64  # of a calibration's own measurement, which is made anew here on the text of all methods
_IRRELEVANT = OPERATIONAL | {"sparsity", "grid", "weights"}


def compare(
    model: str | Path,
    output: str | Path,
    *,
    methods: str | Method | Sequence[str | Method] = COMPARE_METHODS,
    sparsities: float | Sequence[float] = COMPARE_SPARSITIES,
    data: Data = None,
    heldout: Data = None,
    samples: int = 128,
    seq_len: int = 2048,
    tokens: int = EVALUATED_TOKENS,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    draw: bool = False,
    progress: Hearing = None,
) -> Comparison:
    """Calibrate a model with several methods and measure each at several sparsities.

    Args:
        model: a Hugging Face model folder, a Hub repository id, or `demo`.
        output: folder for the cells and the results; made where it is missing. Finished cells in it are used.
        methods: names of `wina_calib.studies.compare.methods.METHODS`, of groups (`papers`, `ablation`), or `Method` objects.
        sparsities: model sparsities in (0, 1).
        data: calibration text, as for `calibrate`.
        heldout: text to measure on.
        samples: calibration blocks.
        seq_len: tokens a block.
        tokens: tokens to measure on.
        seed: of every random choice.
        device: compute device.
        dtype: compute dtype.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run Python code that the model folder brings.
        draw: also draw the plot.
        progress: as `wina_calib.common.bars.hearing` takes it.

    Returns:
        All rows asked for; `compare.json`, `compare.md` and, drawn, `compare.png` and `bits.png` in the folder say the same.

    Raises:
        WinaError: model, text or options cannot be used, or no method can.

    Example:
        ```python
        wina_calib.compare("demo", "demo-compare", methods=("teal", "ours"), sparsities=(0.5,)).rows
        ```
    """
    if draw:
        plots.require()
    chosen = find_methods((methods,) if isinstance(methods, str | Method) else methods)
    grid = (sparsities,) if isinstance(sparsities, int | float) else tuple(sparsities)
    base = {
        "sparsity": grid[0] if grid else 0.0, "grid": grid, "data": data, "samples": samples, "seq_len": seq_len,
        "seed": seed, "device": device, "dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    shared = make_options(base)  # refuses what is out of range before any work
    if not grid or tokens < 2:
        raise UsageError(f"{len(grid)} sparsities and {tokens} tokens; expected at least one, and two tokens.")
    with remote_code(trust_remote_code), hearing(progress) as report:
        source = open_source(model, revision=revision)
        tokenizer, place = source.tokenizer(), pick_device(device)
        shared = replace(shared, data=data_for(tokenizer, shared.data))
        bench = _Bench(
            source=source,
            folder=Path(output).expanduser(),
            shared=shared,
            blocks=evaluation_blocks(data_specs(heldout), tokenizer, tokens, fitting_length(source, seq_len)),
            weights=source.shards.fingerprint(model_names(source.shards, source.architecture)),
            device=place,
            dtype=pick_dtype(dtype, source.dtype, place),
            report=report,
        )
        bench.text(shared)  # too short a text is refused at once
        with readable_errors(bench.folder):
            (bench.folder / "cells").mkdir(parents=True, exist_ok=True)
        with lock(bench.folder.absolute()), torch.inference_mode(False), torch.enable_grad():
            comparison = bench.run(chosen, tuple(sorted(set(grid))))
            if not comparison.rows:
                raise UsageError(
                    f"nothing could be measured. {'; '.join(f'{s.method}: {s.reason}' for s in comparison.skipped)}"
                )
            write_file(bench.folder / "compare.json", json_bytes(comparison.to_dict()))
            write_file(bench.folder / "compare.md", comparison.markdown().encode())
            if draw:
                write_file(bench.folder / "compare.png", draw_comparison(comparison))
                write_file(bench.folder / "bits.png", draw_bits(comparison))
        return comparison


@dataclass(frozen=True)
class _Task:
    """One method with what it needs: its options, the digest of all that its figures depend on, and its open cells."""

    method: Method
    options: CalibrateOptions
    key: dict[str, Any]
    text: Blocks
    todo: tuple[float, ...]


@dataclass(frozen=True)
class _Bench:
    """One comparison under way."""

    source: Source
    folder: Path
    shared: CalibrateOptions
    blocks: Blocks
    weights: str
    device: torch.device
    dtype: torch.dtype
    report: Progress
    texts: dict[tuple[Any, ...], Blocks] = field(default_factory=dict)

    def run(self, methods: Sequence[Method], sparsities: Sequence[float]) -> Comparison:
        """Compute the cells that are missing and collect all."""
        rows: dict[tuple[str, float], Row] = {}
        skipped: list[Skipped] = []
        tasks: list[_Task] = []
        for method in methods:
            try:
                task = self._task(method, sparsities, rows)
            except WinaError as error:
                skipped.append(Skipped(method.name, None, str(error)))
                continue
            skipped += [Skipped(method.name, s, reason) for s, reason in self._impossible(method, task.todo)]
            left = tuple(s for s in task.todo if not any((k.method, k.sparsity) == (method.name, s) for k in skipped))
            if left:
                tasks.append(_Task(method, task.options, task.key, task.text, left))
        self.report.note(self._plan(tasks, len(rows)))
        self.report.planned(Estimate(tuple(part for task in tasks for part in self._parts(task))))
        for task in tasks:
            try:
                for row in self._measure_gates(task) if task.method.gated else self._measure_sites(task):
                    rows[row.method, row.sparsity] = row
                    record = {"format": FORMAT, "key": task.key, "row": asdict(row)}
                    write_file(self._cell(task.method, row.sparsity, task.key), json_bytes(record))
            except WinaError as error:
                skipped.append(Skipped(task.method.name, None, str(error)))
        shutil.rmtree(self.folder / "calibrations", ignore_errors=True)
        order = [(m.name, s) for m in methods for s in sparsities]
        return Comparison(
            model=self.source.name,
            protocol=self._protocol,
            methods={m.name: m.about for m in methods},
            budgets={m.name: m.budget for m in methods},
            rows=tuple(rows[key] for key in order if key in rows),
            skipped=tuple(skipped),
        )

    # --- what is to be done -----------------------------------------------------------------------------------------

    def _task(self, method: Method, sparsities: Sequence[float], rows: dict[tuple[str, float], Row]) -> _Task:
        """The cells of a method that are still open; finished ones go to `rows`."""
        own = asdict(self.shared) | dict(method.options)
        own["samples"] = max(1, round(own["samples"] * method.share))
        options = make_options(own)
        transform = plan(options.transform, self.source.architecture)  # refuses one that is not exact here
        if not method.gated:
            settle(options, self.source.architecture, count_cells(self.source.architecture, transform.name))
        text = self.text(options)
        key = self._key(method, options, text)
        known = {s: read_cell(self._cell(method, s, key), key) for s in sparsities}
        rows |= {(method.name, s): row for s, row in known.items() if row is not None}
        return _Task(method, options, key, text, tuple(s for s, row in known.items() if row is None))

    def text(self, options: CalibrateOptions) -> Blocks:
        """The calibration text of some options, read once."""
        wanted = (options.data, options.samples)
        if wanted not in self.texts:
            seq_len, tokenizer = fitting_length(self.source, options.seq_len), self.source.tokenizer()
            found = load_blocks(options.data, tokenizer, samples=options.samples, seq_len=seq_len, seed=options.seed)
            self.texts[wanted] = found
        return self.texts[wanted]

    def _key(self, method: Method, options: CalibrateOptions, text: Blocks) -> dict[str, Any]:
        """Everything that a method's figures depend on, the sparsity left out."""
        key: dict[str, Any] = finite(
            {
                "weights": self.weights,
                "method": "gates" if method.gated else "sites",
                "options": {k: v for k, v in asdict(options).items() if k not in _IRRELEVANT},
                "calibration_text": text.fingerprint,
                "heldout_text": self.blocks.fingerprint,
                "device": self.device.type,
                "dtype": str(self.dtype),
                "versions": self._protocol["versions"],
            }
        )
        if digest := budget_digest(options.budget):
            key["budget_file"] = digest
        return key

    @property
    def _protocol(self) -> dict[str, Any]:
        return {
            "data": list(self.shared.data),
            "heldout": list(self.blocks.data),
            "samples": self.shared.samples,
            "seq_len": fitting_length(self.source, self.shared.seq_len),
            "tokens": self.blocks.tokens,
            "seed": self.shared.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "versions": {name: version for name, version in versions().items() if name != "python"},
        }

    def _cell(self, method: Method, sparsity: float, key: Mapping[str, Any]) -> Path:
        return self.folder / "cells" / f"{method.name}-{sparsity:g}-{key_digest(key)}.json"

    def _impossible(self, method: Method, sparsities: Sequence[float]) -> list[tuple[float, str]]:
        most = gated_share(self.source.architecture) if method.gated else 1.0
        reason = f"Masks of up and down alone reach model sparsities below {most:.3f}."
        return [(s, reason) for s in sparsities if s >= most]

    def _plan(self, tasks: Sequence[_Task], present: int) -> str:
        """What there is and what will be computed, in words."""
        cells = sum(len(task.todo) for task in tasks)
        others = len(list((self.folder / "cells").glob("*.json"))) - present
        parts = [f"{cells} cells of {len(tasks)} methods to compute, {present} there already"]
        parts += [f"budgets: {', '.join(f'{t.method.name} {t.method.budget}' for t in tasks)}"] if tasks else []
        if others:
            parts.append(f"{others} of another protocol, method or sparsity left aside")
        weights = 2.0 * sum(site.weights for _, site in self.source.architecture.sites)
        flops = sum(weights * (self._passes(t) * t.text.tokens + 2 * len(t.todo) * self.blocks.tokens) for t in tasks)
        return "; ".join([*parts, f"about {flops / 1e12:,.1f} TFLOP"]) if tasks else "; ".join(parts)

    def _parts(self, task: _Task) -> list[Part]:
        """The phases of a method, in tokens that go through the model."""
        name, blocks = task.method.name, len(self.blocks.ids)
        fit = Part(f"{name}: fit gates", 1) if task.method.gated else Part(f"{name}: calibrate", Within.STEPS)
        fit = replace(fit, cost=self._passes(task) * task.text.tokens)
        return [fit, *(Part(f"{name}: measure at {s:g}", blocks, 2.0 * self.blocks.tokens) for s in task.todo)]

    def _passes(self, task: _Task) -> float:
        """Forward passes over the calibration text that a method's calibration is worth."""
        if task.method.gated:
            return 2.0 * len(task.todo)
        transform = plan(task.options.transform, self.source.architecture).name
        statistics = 1.0 if needed_sites(transform, self.source.architecture) else 0.0
        return statistics + CLOSED_LOOP_PASSES * len(task.todo) + choice_passes(task.options, task.text.tokens)

    # --- doing it ---------------------------------------------------------------------------------------------------

    def _measure_sites(self, task: _Task) -> Iterator[Row]:
        """Rows of a method that masks sites: a checkpoint is made, measured at each sparsity, and deleted at the end.

        Where a run is stopped between two cells, the finished checkpoint is kept and used by the next.
        """
        name = task.method.name
        place = self.folder / "calibrations" / f"{name}-{key_digest(task.key)}"
        checkpoint, took = place / "checkpoint", finished_seconds(place, task.todo)
        if took is None:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            values = asdict(task.options)
            untouched = plan(task.options.transform, self.source.architecture).name == "none"
            by_reference = (
                untouched and self.source.is_plain and not (task.options.bits or self.source.opened.runs_code)
            )
            asked = task.options.sparsity if task.options.bits else task.todo[0]
            values |= {"grid": task.todo, "sparsity": asked, "weights": "reference" if by_reference else "full"}
            start = time.monotonic()
            heard = Within(self.report, f"{name}: calibrate")
            run_calibration(self.source.name, checkpoint, make_options(values), heard, held_tokens=_HELD_TOKENS)
            took = time.monotonic() - start
            write_file(place / "seconds.json", json_bytes(took))
        device_map = self.device if self.device.type != "cpu" else None
        model = load(checkpoint, dtype=self.dtype, device_map=device_map, base=str(self.source.folder))
        cells = stored_cells(describe(model), sparse_sites(model)[0].settings)
        for sparsity in task.todo:
            self.report.phase(f"{name}: measure at {sparsity:g}", len(self.blocks.ids))
            start = time.monotonic()
            set_sparsity(model, sparsity)
            measured = measure(model, self.blocks, self.report)
            base_ppl = self.base_ppl if task.options.bits else measured.dense_ppl
            seconds = time.monotonic() - start
            yield _row(name, sparsity, measured, cells, base_ppl, seconds=seconds, calibration_seconds=took)
        shutil.rmtree(place, ignore_errors=True)

    @cached_property
    def base_ppl(self) -> float:
        """Perplexity of the original model on the held-out text."""
        stream = LayerStream.of(self.source, self.blocks.ids, self.device, self.dtype)
        return perplexity(float(next_token_nll(stream, dense_pass(stream)).double().mean()))

    @torch.no_grad()
    def _measure_gates(self, task: _Task) -> Iterator[Row]:
        """Rows of a method that masks the MLP's gate."""
        arch, share = self.source.architecture, gated_share(self.source.architecture)
        self.report.phase(f"{task.method.name}: fit gates", 1)
        start = time.monotonic()
        stream = LayerStream.of(self.source, task.text.ids, self.device, self.dtype)
        fitted = fit_gates(stream, [sparsity / share for sparsity in task.todo])
        took = time.monotonic() - start
        self.report.step("gates")
        model = load_whole(self.source, self.dtype).to(self.device)
        cells = count_cells(arch, "none")
        for sparsity, thresholds in zip(task.todo, fitted, strict=True):
            self.report.phase(f"{task.method.name}: measure at {sparsity:g}", len(self.blocks.ids))
            start = time.monotonic()
            measured = self._gated(model, thresholds)
            seconds = time.monotonic() - start
            name = task.method.name
            yield _row(name, sparsity, measured, cells, measured.dense_ppl, seconds=seconds, calibration_seconds=took)

    def _gated(self, model: PreTrainedModel, thresholds: Tensor) -> Measured:
        """Quality with masked gates."""
        decoder = model.get_decoder()
        totals, seen, dropped = torch.zeros(4, dtype=torch.float64), 0, 0
        for index, ids in enumerate(self.blocks.ids.to(self.device)):
            dense = decoder(input_ids=ids[None, :-1], use_cache=False).last_hidden_state
            with masked_gates(model, self.source.architecture, thresholds) as count:
                sparse = decoder(input_ids=ids[None, :-1], use_cache=False).last_hidden_state
            totals += block_sums(model, dense, sparse, ids)
            seen, dropped = seen + count.seen, dropped + count.dropped
            self.report.step(f"block {index + 1}")
        quality = Quality.of(totals, self.blocks.tokens - len(self.blocks.ids))
        real = dropped / seen * gated_share(self.source.architecture)
        return Measured(**vars(quality), model_sparsity=real, sites={})


def _row(
    name: str,
    sparsity: float,
    measured: Measured,
    cells: Cells,
    base_ppl: float,
    *,
    seconds: float,
    calibration_seconds: float,
) -> Row:
    return Row(
        method=name,
        sparsity=sparsity,
        **measured.figures(),
        read_fraction=cells.read_fraction_at(measured.model_sparsity),
        read_fraction_decoder=cells.read_fraction_at(measured.model_sparsity, lm_head=False),
        tokens=measured.tokens,
        seconds=seconds,
        calibration_seconds=calibration_seconds,
        bits_read=cells.bits_read_at(measured.model_sparsity),
        bits_stored=cells.bits_read_at(0.0),
        base_ppl=base_ppl,
    )
