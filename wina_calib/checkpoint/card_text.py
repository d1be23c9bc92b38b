"""The text of a model card: how to load the checkpoint, what it was measured to do, how it was made, where its limits are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wina_calib.budgets import Cells
from wina_calib.checkpoint.base_model import Base
from wina_calib.checkpoint.evaluation_file import read_evaluation
from wina_calib.checkpoint.facts import REBUDGETED
from wina_calib.checkpoint.format import HEAT_MAP, WINA_FILE, stored_cells
from wina_calib.checkpoint.local_paths import published, published_facts
from wina_calib.checkpoint.reader import Checkpoint
from wina_calib.checkpoint.settings import Settings
from wina_calib.checkpoint.verdict import Verdict
from wina_calib.common.printable import MAX_LINE, one_line
from wina_calib.common.text import human_bytes, markdown_table, percent, rise, share
from wina_calib.model.architecture import SITES
from wina_calib.model.folder import RUNTIME_TYPE, is_reference, open_folder


def made_text(opened: Checkpoint, base: Base, name: str) -> str:
    """The card's text in Markdown."""
    settings, folder = opened.settings, opened.folder
    link = f"[{base.repo}](https://huggingface.co/{base.repo})" if base.repo else code(base.shown)
    parts = [
        f"{link} with calibrated activation sparsity: at every linear layer of the decoder, inputs whose "
        f"score is below a fitted threshold are skipped, {share(settings.sparsity)} of them by default, and the "
        "weight columns that they would meet are not read. Made by wina_calib with the method of "
        "[WINA](https://arxiv.org/abs/2505.19427).",
        _loading(folder, settings, name),
        _figures(opened),
        _expected(settings),
        _budget(opened),
        _making(settings, base),
        _limits(opened),
    ]
    return "\n\n".join(part for part in parts if part)


def _loading(folder: Path, settings: Settings, name: str) -> str:
    own_code = open_folder(folder).names_code
    lines = [
        "import wina_calib",
        f'model = wina_calib.load("{name}"{", trust_remote_code=True" if own_code else ""})',
        f"wina_calib.set_sparsity(model, {settings.sparsity:.4g})",
    ]
    text = "## Load it\n\n`pip install wina-calib`, then\n\n```python\n" + "\n".join(lines) + "\n```\n\n"
    if own_code:
        text += "The model's class is Python code in this repository, which then runs: read it first.\n\n"
    if is_reference(folder):
        return text + (
            "This repository holds the calibration only, a few megabytes; loading takes the weights from the base model "
            "and checks that they are the ones it was made for."
        )
    kind = str(open_folder(folder).stored.get("model_type"))
    if kind.startswith(RUNTIME_TYPE):
        text += f"Without `import wina_calib` no transformers knows the model type {code(kind)}.\n\n"
    return text + (
        "After `import wina_calib`, `AutoModelForCausalLM.from_pretrained` and `pipeline` load it as well. Any sparsity "
        "between 0 and 1 can be set while it runs."
    )


def _figures(opened: Checkpoint) -> str:
    settings = opened.settings
    cells = stored_cells(opened.architecture, settings)
    measured = read_evaluation(opened.folder)
    rows = [
        ("transform", f"{settings.transform}, {cells.runtime_matrices:,} run-time weights"),
        ("score, masks, selection", f"{settings.score}, {settings.masks}, {settings.select}"),
        ("budget", code(settings.budget)),
        ("sparsity asked", percent(settings.sparsity)),
        *_quantized(settings),
    ]
    if measured is None:
        rows += [
            (
                "read fraction expected",
                f"{percent(cells.read_fraction_at(opened.dropped(settings.sparsity)))} with lm_head",
            ),
            ("bits read a decoder weight", f"{cells.bits_read_at(opened.dropped(settings.sparsity)):.2f}"),
            ("quality", "not measured yet: `wina-calib evaluate DIR --save`"),
        ]
    else:
        dense, sparse = measured["dense_ppl"], measured["sparse_ppl"]
        own = "dense" if settings.weights_name is None else f"{settings.weights_name}, 0 %"
        over = "" if settings.weights_name is None else f" over {own}"
        rows += [
            (f"sparsity achieved (asked {percent(measured['sparsity'])})", percent(measured["model_sparsity"])),
            ("read fraction", f"{percent(measured['read_fraction'])} with lm_head"),
            ("read fraction, decoder", percent(measured["read_fraction_decoder"])),
            ("bits read a decoder weight", f"{_bits_read(measured, cells):.2f}"),
            (f"perplexity {own}", f"{dense:.3f}"),
            ("perplexity sparse", f"{sparse:.3f} ({rise(sparse, dense)}{over})"),
            *_over_the_original(settings, measured),
            (f"KL divergence from {own}", f"{measured['kl']:.4f} nats/token"),
            ("same most likely token", percent(measured["top1_agreement"])),
            ("measured on", f"{measured['tokens']:,} tokens of {_data(measured['data'])}"),
        ]
    base_ppl = settings.provenance.get("base_ppl")
    # Beside figures of other tokens it would look as if the checkpoint were another dense model.
    comparable = measured is None or measured.get("base_ppl_comparable") is True
    if isinstance(base_ppl, int | float) and comparable:
        data = _data(settings.provenance.get("base_ppl_data", ()))
        tokens = _count(settings.provenance.get("base_ppl_tokens"), ",")
        rows.append(("perplexity of the base model", f"{base_ppl:.3f} on {tokens} tokens of {data}"))
    meaning = "Read fraction: bytes of weights read for a token over the dense model's, run-time matrices included."
    return f"## Figures\n\n{markdown_table(('', ''), rows)}\n\n{meaning}"


def _over_the_original(settings: Settings, measured: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of a checkpoint with quantized weights, what is known of its rise over the original model."""
    if settings.weights_name is None:
        return []
    verdict, base = Verdict.from_facts(settings.provenance), settings.provenance.get("base_ppl")
    if isinstance(base, int | float) and base > 0 and measured.get("base_ppl_comparable") is True:
        told = rise(measured["sparse_ppl"], base)
    elif verdict is not None:
        cost = f"{settings.weights_name} alone cost {100 * verdict.quantizing:+.1f} %"
        told = f"not measured on this text; on calibration's held-out text {cost}"
    else:
        told = "not measured"
    return [("rise over the original model", told)]


def _bits_read(measured: Mapping[str, Any], cells: Cells) -> float:
    """As measured, which evaluations of before bits were counted do not say: their sites have all the same."""
    found = measured.get("bits_read")
    return float(found) if isinstance(found, int | float) else cells.bits_read_at(measured["model_sparsity"])


def _quantized(settings: Settings) -> list[tuple[str, str]]:
    form, kept = settings.weight_format, len(settings.modules_to_not_convert)
    if form is None:
        return []
    groups = f" in groups of {form.group_size} outputs, {'with' if form.zero_point else 'without'} zeros"
    rest = f", {kept} projections 16 bits" if kept else ""
    return [("weights", f"int{form.bits}{groups if form.bits == 4 else ''}{rest}, lm_head {settings.head_bits} bits")]


def _expected(settings: Settings) -> str:
    """What calibration expects at other sparsities."""
    verdict = Verdict.from_facts(settings.provenance)
    if verdict is None:
        return ""
    warning = f"\n\n**{verdict.warning[0].upper()}{verdict.warning[1:]}.**" if verdict.warning else ""
    rows = [(what, much) for what, much in verdict.rows()]
    return f"## What to expect\n\nBy calibration, on held-out text.\n\n{markdown_table(('', ''), rows)}{warning}"


def _budget(opened: Checkpoint) -> str:
    sparsities = opened.sparsities(opened.settings.sparsity)
    rows = [(str(i), *(f"{value:.3f}" for value in row)) for i, row in enumerate(sparsities.tolist())]
    rows.append(("mean", *(f"{value:.3f}" for value in np.mean(sparsities, axis=0))))
    picture = f"![site sparsity by layer and site]({HEAT_MAP})\n\n" if (opened.folder / HEAT_MAP).is_file() else ""
    return (
        f"## Budget\n\nShare of inputs dropped at each site.\n\n{picture}<details><summary>table</summary>\n\n"
        + markdown_table(("layer", *SITES), rows)
        + "\n\n</details>"
    )


def _making(settings: Settings, base: Base) -> str:
    facts = published_facts(settings.provenance)
    versions = facts.get("versions")
    shown = versions if isinstance(versions, dict) else {}
    later = facts.get(REBUDGETED)
    chosen = f"{code(settings.budget)} for {percent(settings.sparsity)}, thresholds {code(str(later))}"
    rows = [
        ("command", code(str(facts.get("command", "unknown")))),
        *([("budget chosen later", f"`wina-calib budget`: {chosen}")] if later is not None else []),
        ("base model", code(base.shown) + (f" at commit {code(base.commit)}" if base.commit else "")),
        ("weights", f"sha256 {code(settings.weights)}"),
        *([("trained", how)] if (how := trained(facts)) else []),
        ("data", f"{_data(facts.get('data', ()))}, sha256 {code(str(facts.get('data_fingerprint')))}"),
        (
            "tokens",
            "{} blocks of {}, seed {}".format(*(_count(facts.get(name)) for name in ("blocks", "seq_len", "seed"))),
        ),
        ("fitted at", ", ".join(percent(anchor) for anchor in settings.fitted_anchors)),
        ("versions", ", ".join(code(f"{name} {version}") for name, version in shown.items())),
    ]
    return "## How it was made\n\n" + markdown_table(("", ""), rows)


def trained(facts: Mapping[str, Any]) -> str:
    """How the weights were trained after calibration: on what, how long; empty where they were not."""
    found = facts.get("recovered")
    if not isinstance(found, dict):
        return ""
    given, data, seconds = found.get("sparsities"), found.get("data"), found.get("seconds")
    shares = ", ".join(f"{s:.0%}" for s in given if isinstance(s, float)) if isinstance(given, list) else "?"
    steps, tokens = _count(found.get("steps"), ","), _count(found.get("tokens"), ",")
    text = f" of {_data(data)}" if isinstance(data, list) else ""
    time = f", {seconds:,.0f} s" if isinstance(seconds, int | float) else ""
    return f"`wina-calib recover`: {steps} steps on {tokens} tokens{text}{time}, under masks at {shares}"


def _sizes(opened: Checkpoint) -> str:
    """What the files of tensors take, and what memory follows from that."""
    own = [info.nbytes for name, info in opened.shards.items() if info.file.name == WINA_FILE]
    weights = [info.nbytes for name, info in opened.shards.items() if info.file.name != WINA_FILE]
    calibration = f"{human_bytes(sum(own))} of calibration"
    if is_reference(opened.folder):
        return (
            f"Its file holds {calibration}; memory takes the base model's weights as well. What falls is the bytes read for a "
            "token while decoding."
        )
    untied = ""
    if opened.settings.provenance.get("untied") is True:
        untied = " The original shares lm_head with its embeddings, this one cannot: that is in these bytes."
    return (
        f"Its files hold {human_bytes(sum(weights))} of weights and {calibration}, and memory takes as much at least: sparsity "
        f"makes neither smaller; what falls with it is the bytes read for a token while decoding.{untied}"
    )


def _limits(opened: Checkpoint) -> str:
    settings, reference = opened.settings, is_reference(opened.folder)
    first, last = settings.fitted_anchors[0], settings.fitted_anchors[-1]
    points = [
        "Thresholds fit text like the calibration data. On other text the achieved sparsity and the quality differ: "
        "measure with `wina-calib evaluate DIR --data YOUR_TEXT`.",
        f"Thresholds were fitted at {percent(first)} to {percent(last)} sparsity; above, they are extrapolated.",
        _sizes(opened),
        *(
            [
                "Kernels for its quantized weights are wina_calib's: where there is none for a device, it is slower than dense."
            ]
            if settings.weight_format is not None
            else []
        ),
        "What the base model gets wrong, this model gets wrong too; its licence and its limits hold here.",
    ]
    if settings.weight_format is not None:
        points.append(
            "Its weights are quantized: without wina_calib it does not load. `wina-calib export-dense DIR -o OUT` writes the "
            "dense model that it stands for."
        )
    elif settings.transform in ("paper", "stacked"):
        points.append("It needs run-time matrices: without wina_calib it does not load.")
    elif trained(settings.provenance):
        points.append(
            "Its weights were trained under masks: at sparsity 0, and in transformers without wina_calib, it is another model "
            "than the base model."
        )
    elif not reference:
        points.append("Without wina_calib, transformers loads it as the dense model, with a report of unused tensors.")
    return "## Limits\n\n" + "\n".join(f"- {point}" for point in points)


def _count(value: Any, form: str = "") -> str:
    return format(value, form) if isinstance(value, int) else "?"


def _data(specs: Sequence[Any]) -> str:
    return code(", ".join(published(str(spec)) for spec in specs))


def code(text: str) -> str:
    """Text as Markdown code that nothing in it can leave, also inside a table."""
    plain = one_line(" ".join(text.split()), MAX_LINE).replace("`", "'").replace("|", "/")
    return f"`{plain}`" if plain else "-"
