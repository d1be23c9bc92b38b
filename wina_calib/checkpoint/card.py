"""The model card of a checkpoint, made from its facts.

What stands between two marks is made anew; the rest of an existing README.md, and metadata that people set, stay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wina_calib.budgets import Cells
from wina_calib.checkpoint.card_figures import figures
from wina_calib.checkpoint.card_figures import merged as merged_figures
from wina_calib.checkpoint.card_metadata import CARD, facts_of_base, head, split_card
from wina_calib.checkpoint.evaluation_file import read_evaluation
from wina_calib.checkpoint.facts import REBUDGETED
from wina_calib.checkpoint.format import HEAT_MAP, WINA_FILE, stored_cells
from wina_calib.checkpoint.local_paths import base_model_here, published, published_facts
from wina_calib.checkpoint.reader import Checkpoint, open_checkpoint
from wina_calib.checkpoint.settings import Settings
from wina_calib.checkpoint.verdict import Verdict
from wina_calib.common.atomic import write_file
from wina_calib.common.printable import MAX_LINE, one_line
from wina_calib.common.text import human_bytes, percent, rise, share
from wina_calib.corpus.sources import catalogue
from wina_calib.errors import HubError
from wina_calib.model.architecture import SITES
from wina_calib.model.config import is_reference, open_folder
from wina_calib.model.locate import DEMO, demo_folder
from wina_calib.storage.hub_client import fetch, is_repo_name

TAGS = ("wina", "activation-sparsity", "arxiv:2505.19427")
BEGIN = "<!-- wina_calib: made from the checkpoint's facts up to the end mark; write your own text outside -->"
END = "<!-- wina_calib: end -->"
_LICENCE = ("license", "license_name", "license_link")
_UNKNOWN_LICENCE = "licence-of-the-base-model"
_COMMIT = re.compile(r"[0-9a-f]{7,64}")


@dataclass(frozen=True)
class Base:
    """The base model: its Hub id where it has one, the name to show, and the metadata of its own card."""

    repo: str | None
    commit: str | None
    shown: str
    metadata: dict[str, Any]


def write_card(
    folder: Path, *, repo: str | None = None, name: str | None = None, base_model: str | None = None
) -> None:
    """Write README.md into a checkpoint's folder, or bring it up to date; nothing is asked of the network.

    Args:
        folder: the checkpoint.
        repo: its repository on the Hub, which the examples then name; else they name the folder.
        name: the folder's name once it is published, where it has another one yet.
        base_model: the base model's id on the Hub, in place of what is known of it.

    Raises:
        CheckpointError: the checkpoint is damaged, or README.md begins with metadata that is no YAML.
    """
    opened = open_checkpoint(folder)
    path = folder / CARD
    metadata, text = split_card(path) if path.is_file() else ({}, "")
    if base_model is not None:
        metadata = metadata | {"base_model": base_model}
    if metadata.get("license_name") == _UNKNOWN_LICENCE:  # made by us when nothing was known of it
        metadata = {key: value for key, value in metadata.items() if key not in _LICENCE}
    base = find_base(opened.settings, metadata)
    name = repo or name or Path(folder).name.removeprefix(".").removesuffix(".partial")
    measured = read_evaluation(folder)
    shown = {} if measured is None else figures(name.rpartition("/")[2], measured)
    merged = complete(metadata, made_metadata(folder, opened.settings, base), shown)
    block = f"{BEGIN}\n{made_text(opened, base, name)}\n{END}"
    if BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        text = before + block + rest.partition(END)[2]
    else:
        text = f"{text.rstrip()}\n\n{block}\n" if text.strip() else f"# {name.rpartition('/')[2]}\n\n{block}\n"
    write_file(path, f"---\n{head(merged)}---\n{text}".encode("utf-8", "backslashreplace"))


def complete(metadata: dict[str, Any], made: dict[str, Any], shown: dict[str, Any]) -> dict[str, Any]:
    """Metadata that people set, with what is missing; tags of both, and the figures `shown` beside those of others."""
    tags = metadata.get("tags")
    own = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    theirs = {k: v for k, v in metadata.items() if v is not None and k not in ("metrics", "model-index")}
    merged = made | theirs | merged_figures(metadata, shown)
    return merged | {"tags": list(dict.fromkeys([*made["tags"], *own]))}


def made_metadata(folder: Path, settings: Settings, base: Base) -> dict[str, Any]:
    """Metadata that follows from the facts; the Hub's keys."""
    metadata: dict[str, Any] = {}
    if base.repo is not None:
        metadata |= {"base_model": base.repo, "base_model_relation": "quantized"}
    metadata |= licence(folder, base)
    reference = is_reference(folder)
    metadata |= {"library_name": "wina-calib" if reference else "transformers", "pipeline_tag": "text-generation"}
    language = base.metadata.get("language")
    if isinstance(language, str | list):
        metadata["language"] = language
    datasets = hub_datasets(settings.data)
    if datasets:
        metadata["datasets"] = datasets
    return metadata | {"tags": list(TAGS)}


def licence(folder: Path, base: Base) -> dict[str, str]:
    """The base model's licence: as its card has it, or the licence file that came with it."""
    found = {key: str(base.metadata[key]) for key in _LICENCE if isinstance(base.metadata.get(key), str)}
    files = sorted(path.name for path in folder.iterdir() if path.name.upper().startswith("LICENSE"))
    if not found and files:
        found = {"license": "other", "license_name": _UNKNOWN_LICENCE}
    if found.get("license") == "other" and "license_link" not in found and files:
        found["license_link"] = files[0]
    link = found.get("license_link")
    if link and base.repo and "://" not in link and link not in files:
        found["license_link"] = f"https://huggingface.co/{base.repo}/blob/{base.commit or 'main'}/{link}"
    return found


def hub_datasets(specs: Sequence[str]) -> list[str]:
    """Hub datasets among data specs."""
    known = catalogue()
    names = []
    for spec in specs:
        name, _, rest = str(spec).partition(":")
        if name == "hub":
            names.append(rest.partition(":")[0])
        elif name in known:
            names.append(str(known[name]["path"]))
    return list(dict.fromkeys(name for name in names if is_repo_name(name)))


def find_base(settings: Settings, metadata: Mapping[str, Any] | None = None) -> Base:
    """What is known of the base model without asking the network, by the calibration or by the card that people filled."""
    name, commit = settings.provenance.get("base_model"), settings.provenance.get("base_commit")
    name = name if isinstance(name, str) else "unknown"
    told = (metadata or {}).get("base_model")
    told = told[0] if isinstance(told, list) and told else told  # of a merge the Hub takes several
    if isinstance(told, str) and "/" in told and is_repo_name(told) and told != name:
        return Base(told, None, told, _cached_facts(told, None))
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit) or not is_repo_name(name):
        local = demo_folder() if name == DEMO else base_model_here(settings.weights, name)
        shown = published(name) if local is None else local.name
        return Base(None, None, shown, facts_of_base(local) if local is not None else {})
    return Base(name, commit, name, _cached_facts(name, commit))


def _cached_facts(repo: str, commit: str | None) -> dict[str, Any]:
    """Facts from the card of a model of the Hub that is in the cache; none where it is not."""
    try:
        return dict(facts_of_base(fetch(repo, revision=commit, local_files_only=True)[0]))
    except HubError:
        return {}


def made_text(opened: Checkpoint, base: Base, name: str) -> str:
    """The card's text in Markdown."""
    settings, folder = opened.settings, opened.folder
    parts = [
        f"{_base_link(base)} with calibrated activation sparsity: at every linear layer of the decoder, inputs whose "
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


def _base_link(base: Base) -> str:
    return f"[{base.repo}](https://huggingface.co/{base.repo})" if base.repo else code(base.shown)


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
    return f"## Figures\n\n{_table(('', ''), rows)}\n\n{meaning}"


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
    return f"## What to expect\n\nBy calibration, on held-out text.\n\n{_table(('', ''), rows)}{warning}"


def _budget(opened: Checkpoint) -> str:
    sparsities = opened.sparsities(opened.settings.sparsity)
    rows = [(str(i), *(f"{value:.3f}" for value in row)) for i, row in enumerate(sparsities.tolist())]
    rows.append(("mean", *(f"{value:.3f}" for value in np.mean(sparsities, axis=0))))
    picture = f"![site sparsity by layer and site]({HEAT_MAP})\n\n" if (opened.folder / HEAT_MAP).is_file() else ""
    return (
        f"## Budget\n\nShare of inputs dropped at each site.\n\n{picture}<details><summary>table</summary>\n\n"
        + _table(("layer", *SITES), rows)
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
        *([("trained", trained)] if (trained := _trained(facts)) else []),
        (
            "data",
            f"{_data(facts.get('data', ()))}, sha256 {code(str(facts.get('data_fingerprint')))}",
        ),
        (
            "tokens",
            "{} blocks of {}, seed {}".format(*(_count(facts.get(name)) for name in ("blocks", "seq_len", "seed"))),
        ),
        ("fitted at", ", ".join(percent(anchor) for anchor in settings.fitted_anchors)),
        ("versions", ", ".join(code(f"{name} {version}") for name, version in shown.items())),
    ]
    return "## How it was made\n\n" + _table(("", ""), rows)


def _trained(facts: Mapping[str, Any]) -> str:
    """How the weights were trained after calibration; empty where they were not."""
    found = facts.get("recovered")
    if not isinstance(found, dict):
        return ""
    given = found.get("sparsities")
    shares = ", ".join(f"{s:.0%}" for s in given if isinstance(s, float)) if isinstance(given, list) else "?"
    steps, tokens = _count(found.get("steps"), ","), _count(found.get("tokens"), ",")
    return f"`wina-calib recover`: {steps} steps on {tokens} tokens, under masks at {shares}"


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
    elif _trained(settings.provenance):
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


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(headers) + " |", "|" + " --- |" * len(headers)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
