"""`recover`: a sparse checkpoint in, one of the same sparsity out whose predictions are nearer to the dense model's.

1. The checkpoint's weights become a plain dense model, whose sites are masked while it trains (`masked_model.py`).
2. It learns the distribution of the original dense model on text (`train.py`); the best weights on held-out text are kept.
3. These are calibrated as any dense model, without a transform and with the checkpoint's own budget: thresholds are fitted
   in closed loop, and weights quantized if so asked.
4. Before and after are measured on text of the kind trained on and of other kinds (`measure.py`).
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from wina_calib.budgets import Budget
from wina_calib.budgets.count import count_cells, model_key
from wina_calib.budgets.file import explicit, write_budget
from wina_calib.calibration.run import calibrate
from wina_calib.checkpoint.card import write_card
from wina_calib.checkpoint.export_dense import export_dense
from wina_calib.checkpoint.local_paths import base_model_here, data_here
from wina_calib.checkpoint.reader import Checkpoint, open_checkpoint
from wina_calib.checkpoint.side_files import copy_side_files
from wina_calib.checkpoint.writer import write_json
from wina_calib.common.atomic import check_output, claimed, publish
from wina_calib.common.bars import Hearing, hearing
from wina_calib.common.devices import pick_device
from wina_calib.common.progress import Estimate, Part, Progress, Within
from wina_calib.corpus.blocks import load_blocks
from wina_calib.corpus.sources import DEFAULT_DATA, HELDOUT_DATA, check_spec
from wina_calib.errors import CorpusError, UsageError, WinaError
from wina_calib.model.architecture import Architecture, describe
from wina_calib.model.config import code_is_trusted, open_folder, read_config, remote_code
from wina_calib.model.locate import load_tokenizer, resolve
from wina_calib.recovery.loss import Quality
from wina_calib.recovery.masked_model import MaskedModel
from wina_calib.recovery.measure import measure
from wina_calib.recovery.options import SELF, RecoverOptions, make_options
from wina_calib.recovery.plan import Size, TrainingPlan, available_memory, plan_training
from wina_calib.recovery.train import Trained, Training
from wina_calib.storage.resume import RunState, open_run_state
from wina_calib.storage.resume_files import drop

HELD_OUT_SHARE, HELD_OUT_MOST = 20, 16  # one sequence of so many is held out, at most so many
MEASURED = {"trained on": None, "built-in held-out": HELDOUT_DATA, "code": ("builtin:heldout:code",)}
MEASURED_TOKENS = 16_384


@dataclass(frozen=True)
class Recovery:
    """What a recovery made.

    Attributes:
        folder: the new checkpoint.
        plan: what was trained.
        trained: what the training came to.
        before: quality of the given checkpoint against the dense model, by kind of text and model sparsity.
        after: of the new one.
    """

    folder: Path
    plan: TrainingPlan
    trained: Trained
    before: dict[str, dict[float, Quality]]
    after: dict[str, dict[float, Quality]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"folder": str(self.folder), "plan": asdict(self.plan), "training": asdict(self.trained)} | {
            name: {kind: {f"{s:g}": asdict(q) | {"rise": q.rise} for s, q in by.items()} for kind, by in found.items()}
            for name, found in (("before", self.before), ("after", self.after))
        }


def recover(checkpoint: str | Path, output: str | Path, *, progress: Hearing = None, **options: Any) -> Recovery:
    """Train a sparse checkpoint to predict as its dense original does.

    Args:
        checkpoint: a calibrated folder, or a Hub id.
        output: folder to write; it appears whole or not at all.
        progress: hears the plan, phases and steps; True is a bar on standard error.
        **options: the fields of `RecoverOptions`: base, data, tokens, sparsities, lr, bits, max_time ...

    Raises:
        WinaError: with a message that says what to do.

    Example:
        ```python
        wina_calib.recover("demo-sparse", "demo-recovered", tokens=200_000)
        ```
    """
    chosen = make_options(options)
    target = Path(output).expanduser().resolve()
    with remote_code(chosen.trust_remote_code), hearing(progress) as report, ExitStack() as held:
        folder, _ = resolve(checkpoint)
        check_output(target, overwrite=chosen.overwrite, keep=folder, made=("config.json",))
        opened = open_checkpoint(folder)
        base = _base(chosen, opened)
        held.enter_context(claimed(target, overwrite=chosen.overwrite))
        state = target.with_name(f".{target.name}.state")
        run = open_run_state(state, lambda: _identity(opened, base, chosen), restart=chosen.restart, report=report)
        try:
            made = _recover(opened, base, target, run, chosen, report)
        except BaseException as error:
            if isinstance(error, WinaError) and not run.useful:
                drop(state)
            raise
        drop(state)
        return made


def _recover(
    opened: Checkpoint, base: Path, target: Path, run: RunState, chosen: RecoverOptions, report: Progress
) -> Recovery:
    assert run.folder is not None
    state = run.folder
    device = pick_device(chosen.device)
    sparsities = chosen.sparsities or (opened.settings.sparsity,)
    if sparsities == (0.0,):
        raise UsageError("the checkpoint is calibrated for sparsity 0; give the sparsities to train with --sparsities.")
    dense = state / "dense"
    if not (dense / "config.json").exists():
        export_dense(opened.folder, dense, overwrite=True)
    teacher = _loaded(base, device, "auto").eval().requires_grad_(False)
    tokenizer = load_tokenizer(base)
    _check_tokenizer(tokenizer, load_tokenizer(opened.folder), base)
    student = _loaded(dense, device, torch.float32)
    arch = describe(student)
    plan = plan_training(_size(student, arch, teacher), chosen, available_memory(device))
    report.planned(_estimate(plan, chosen, sparsities))
    report.note(plan.describe(chosen, available_memory(device)))
    ids, held_out = _text(chosen, opened, tokenizer, teacher)
    before = _qualities("before", opened.folder, teacher, sparsities, tokenizer, held_out, chosen, report)
    student = _prepared(student, arch, plan, chosen)
    masks = MaskedModel(student, opened, sparsities)
    phase = run.phase("training")
    training = Training(student, teacher, masks, arch, ids, held_out, chosen, plan, sparsities, phase, report, device)
    trained = training.run()
    weights = state / "trained"
    _write(student, opened, dense, weights, plan)
    del training, masks, student
    gc.collect()
    made = state / "calibrated"
    _calibrate(weights, made, opened, chosen, sparsities, trained, base, Within(report, "calibrate"))
    write_card(made, name=target.name)
    after = _qualities("after", made, teacher, sparsities, tokenizer, held_out, chosen, report)
    publish(made, target)
    return Recovery(target, plan, trained, before, after)


def _base(chosen: RecoverOptions, opened: Checkpoint) -> Path:
    """The folder of the dense model to learn from."""
    name = chosen.base or opened.settings.provenance.get("base_model")
    if not isinstance(name, str) or not name:
        raise UsageError(f"{opened.folder} does not say which model it was made from. Give that with --base.")
    here = None if chosen.base else base_model_here(opened.folder, name)
    try:
        return here or resolve(name)[0]
    except WinaError as error:
        raise UsageError(f"the base model cannot be had: {error} Give it with --base.") from error


def _identity(opened: Checkpoint, base: Path, chosen: RecoverOptions) -> Mapping[str, Any]:
    operational = ("overwrite", "restart", "device", "trust_remote_code", "max_time")
    options = {k: v for k, v in asdict(chosen).items() if k not in operational}
    return {"checkpoint": opened.settings.weights, "base": base.name, "options": options}


def _loaded(folder: Path, device: torch.device, dtype: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=code_is_trusted(), attn_implementation="sdpa"
    )
    return model.to(device)


def _check_tokenizer(base: Any, own: Any, folder: Path) -> None:
    probe = "The 3 quick brown foxes\n\tjump: naïve 東京, x = {y};"
    if base(probe).input_ids != own(probe).input_ids:
        raise UsageError(
            f"{folder} has another tokenizer than the checkpoint; give the model it was made from with --base."
        )


def _size(student: PreTrainedModel, arch: Architecture, teacher: PreTrainedModel) -> Size:
    config = student.config.get_text_config()
    projections = [p for _, site in arch.sites for p in site.projections]
    return Size(
        weights=sum(p.numel() for p in student.parameters()),
        trained=sum(p.in_features * p.out_features for p in projections),
        projections=sum(p.in_features + p.out_features for p in projections),
        layers=len(arch.layers),
        width=arch.hidden_size,
        inner=max(site.width for _, site in arch.sites),
        vocabulary=config.vocab_size,
        itemsize=teacher.dtype.itemsize,
    )


def _prepared(
    student: PreTrainedModel, arch: Architecture, plan: TrainingPlan, chosen: RecoverOptions
) -> PreTrainedModel:
    """The student with its trained weights: those of the decoder's layers, or adapters put into it."""
    student.requires_grad_(False)
    if plan.adapters:
        from peft import LoraConfig, inject_adapter_in_model

        names = [layer.prefix + p.module for layer, site in arch.sites for p in site.projections]
        torch.manual_seed(chosen.seed)
        inject_adapter_in_model(LoraConfig(r=chosen.rank, lora_alpha=chosen.rank, target_modules=names), student)
    else:
        layers: nn.Module = student.get_submodule(arch.layers_path)
        layers.requires_grad_(True)
    enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # the first name since transformers 5.24
    return student


def _text(
    chosen: RecoverOptions, opened: Checkpoint, tokenizer: Any, teacher: PreTrainedModel
) -> tuple[Tensor, Tensor]:
    """Sequences to train on, and held-out ones of the same kind."""
    count = max(2, chosen.tokens // chosen.seq_len)
    seq_len = min(chosen.seq_len, int(getattr(teacher.config, "max_position_embeddings", chosen.seq_len)))
    if chosen.data == (SELF,):
        ids = _written(teacher, tokenizer, min(count, 512), seq_len, chosen.seed)
    else:
        data = _data(chosen, opened)
        ids = load_blocks(data, tokenizer, samples=count, seq_len=seq_len, seed=chosen.seed, min_tokens=2 * seq_len).ids
    held = min(HELD_OUT_MOST, max(1, len(ids) // HELD_OUT_SHARE))
    if len(ids) <= held:
        raise CorpusError(
            f"only {len(ids)} sequences of {seq_len} tokens; at least 2 are needed. Give more text with --data."
        )
    return ids[:-held], ids[-held:]


def _data(chosen: RecoverOptions, opened: Checkpoint) -> tuple[str, ...]:
    """Text as given, else the calibration's where it can be had by the name that the checkpoint has, else the built-in."""
    if chosen.data and chosen.data != (SELF,):
        return chosen.data
    names = data_here(opened.folder, opened.settings.provenance)
    try:
        for name in names:
            check_spec(name)
    except WinaError:
        return DEFAULT_DATA
    return names or DEFAULT_DATA


@torch.no_grad()
def _written(teacher: PreTrainedModel, tokenizer: Any, count: int, seq_len: int, seed: int) -> Tensor:
    """Text that the dense model writes, sampled from its start token: (count, seq_len)."""
    start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), 0)
    torch.manual_seed(seed)
    rows = []
    for first in range(0, count, 32):
        begin = torch.full((min(32, count - first), 1), start, device=teacher.device)
        out = teacher.generate(
            begin,
            attention_mask=torch.ones_like(begin),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=seq_len - 1,
            min_new_tokens=seq_len - 1,
            pad_token_id=start,
        )
        rows.append(out.cpu())
    return torch.cat(rows)


def _estimate(plan: TrainingPlan, chosen: RecoverOptions, sparsities: tuple[float, ...]) -> Estimate:
    """The parts of the work; costs in passes over a thousand tokens, a step counting four."""
    measured = 2 * MEASURED_TOKENS * (1 + len(sparsities)) / 1000
    tokens = plan.steps * chosen.batch * chosen.seq_len
    parts = (
        Part("measure before", len(MEASURED), measured),
        Part("train", plan.steps, 5 * tokens / 1000),
        Part("calibrate", Within.STEPS, 262.0 * 5),
        Part("measure after", len(MEASURED), measured),
    )
    return Estimate(parts=parts, memory_bytes=plan.memory_bytes, tokens=tokens)


def _qualities(
    when: str,
    folder: Path,
    teacher: PreTrainedModel,
    sparsities: tuple[float, ...],
    tokenizer: Any,
    held: Tensor,
    chosen: RecoverOptions,
    report: Progress,
) -> dict[str, dict[float, Quality]]:
    """Quality of a checkpoint on each kind of text."""
    out: dict[str, dict[float, Quality]] = {}
    report.phase(f"measure {when}", len(MEASURED))
    for kind, data in MEASURED.items():
        ids = held
        if data is not None:
            samples = max(1, MEASURED_TOKENS // held.shape[1])
            ids = load_blocks(
                data, tokenizer, samples=samples, seq_len=held.shape[1], seed=chosen.seed, min_tokens=1
            ).ids
        out[kind] = measure(folder, teacher, sparsities, ids)
        report.step(kind)
    return out


@torch.no_grad()
def _write(student: PreTrainedModel, opened: Checkpoint, dense: Path, folder: Path, plan: TrainingPlan) -> None:
    """The trained weights as a plain model folder, in the dtype of the checkpoint."""
    if plan.adapters:
        for module in list(student.modules()):
            if hasattr(module, "get_delta_weight"):
                module.merge()
        names = {n: n.replace(".base_layer.", ".") for n, _ in student.named_parameters() if ".lora_" not in n}
        values = dict(student.named_parameters())
        state = {new: values[old].detach() for old, new in names.items()}
        plain = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, trust_remote_code=code_is_trusted())
        plain.load_state_dict(state, strict=False)
        student = plain
    dtype = opened.shards[next(n for n in opened.shards if n.endswith("_proj.weight"))].dtype
    student.to(dtype)
    shutil.rmtree(folder, ignore_errors=True)
    student.save_pretrained(folder)
    copy_side_files(open_folder(dense), folder)


def _calibrate(
    weights: Path,
    made: Path,
    opened: Checkpoint,
    chosen: RecoverOptions,
    sparsities: tuple[float, ...],
    trained: Trained,
    base: Path,
    report: Progress,
) -> None:
    """Fit thresholds for the trained weights, with the budget that they were trained under."""
    settings, provenance = opened.settings, opened.settings.provenance
    cells = count_cells(opened.architecture, "none")
    asked = settings.sparsity if settings.sparsity in sparsities else sparsities[-1]
    budget = Budget(opened.sparsities(asked))
    file = weights.parent / "budget.yaml"
    content = explicit(budget, cells, model_key(opened.architecture, cells), asked, settings.score)
    write_budget(file, content)
    facts = {
        "recovered": asdict(trained)
        | {"sparsities": list(sparsities), "tokens": trained.steps * chosen.batch * chosen.seq_len},
        "base_model": provenance.get("base_model", base.name),
        "base_commit": provenance.get("base_commit"),
    }
    calibrate(
        weights,
        made,
        progress=report,
        budget=str(file),
        transform="none",
        grid=tuple(a for a in settings.anchors if a > 0),
        data=_data(chosen, opened),
        samples=int(provenance.get("samples", 128)),
        seq_len=settings.seq_len,
        score=settings.score,
        masks=settings.masks,
        exponent=settings.exponent,
        first_token=settings.first_token,
        prefill=settings.prefill,
        sparsity=asked,
        overwrite=True,
        device=chosen.device,
        **({"bits": chosen.bits, "group_size": chosen.group_size} if chosen.bits else {}),
    )
    config = read_config(made)
    config["quantization_config"]["provenance"] |= facts
    write_json(made / "config.json", config)
