"""Tasks of the lm-eval harness (extra `lm-eval`), sparse and dense side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wina_calib.checkpoint.reader import open_calibrated
from wina_calib.common.devices import pick_device
from wina_calib.common.text import table
from wina_calib.errors import UsageError
from wina_calib.model.locate import load_tokenizer, resolve
from wina_calib.runtime.load import set_prefill, set_sparsity, sparse_sites
from wina_calib.studies.evaluate import load_on


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, of the dense and of the sparse model, each with its standard error."""

    task: str
    metric: str
    dense: float
    dense_error: float | None
    sparse: float
    sparse_error: float | None


def require_harness() -> None:
    """Raise UsageError where lm-eval is missing."""
    if find_spec("lm_eval") is None:
        raise UsageError("tasks need the lm-eval harness. Install it: pip install 'wina-calib[lm-eval]'.")


def evaluate_tasks(
    path_or_repo: str | Path,
    tasks: Sequence[str],
    *,
    sparsity: float | None = None,
    limit: int | None = None,
    include_path: Path | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
) -> tuple[TaskScore, ...]:
    """Run tasks on a checkpoint at sparsity 0 and at its sparsity; the whole prompt is masked, as tasks are prompts.

    Args:
        path_or_repo: checkpoint folder or Hub id.
        tasks: names that the harness knows, or that stand in `include_path`.
        sparsity: model sparsity; None is the one it was calibrated for.
        limit: examples of each task; None is all.
        include_path: folder of further task files.
        batch_size: examples computed together.
        device: compute device.
        dtype: compute dtype; `auto` is the stored one on a GPU and float32 on a CPU.
        revision: branch, tag or commit on the Hub.

    Raises:
        UsageError: lm-eval is missing, or does not know a task.
        WinaError: the checkpoint cannot be used.
    """
    require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include_path) if include_path else None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UsageError(f"lm-eval has no task {', '.join(unknown)}. See `wina-calib lm-eval ls tasks`.")
    folder, _ = resolve(path_or_repo, revision=revision)
    model = load_on(open_calibrated(folder), pick_device(device), dtype)
    set_prefill(model, "sparse")
    asked = sparse_sites(model)[0].settings.sparsity if sparsity is None else sparsity
    harness = HFLM(pretrained=model, tokenizer=load_tokenizer(folder), batch_size=batch_size)
    scores = []
    for level in (0.0, asked):
        set_sparsity(model, level)
        answer = simple_evaluate(
            harness, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False, bootstrap_iters=1000
        )
        scores.append(answer["results"])
    return tuple(_scores(*scores))


def render_tasks(scores: Sequence[TaskScore]) -> str:
    """Scores as a table, dense and sparse side by side."""

    def cell(value: float, error: float | None) -> str:
        return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")

    rows = [
        [s.task, s.metric, cell(s.dense, s.dense_error), cell(s.sparse, s.sparse_error), f"{s.sparse - s.dense:+.4f}"]
        for s in scores
    ]
    return table(["task", "metric", "dense", "sparse", "change"], rows)


def _scores(dense: dict[str, dict[str, Any]], sparse: dict[str, dict[str, Any]]) -> list[TaskScore]:
    """Pair the numbers of two runs. The harness calls a metric `acc,none` and its error `acc_stderr,none`."""
    rows = []
    for task, metrics in dense.items():
        for key, value in metrics.items():
            name, _, _ = key.partition(",")
            if not isinstance(value, int | float) or "," not in key or name.endswith("_stderr"):
                continue
            error = key.replace(",", "_stderr,", 1)
            other = sparse[task]
            rows.append(
                TaskScore(
                    task, name, float(value), _number(metrics.get(error)), float(other[key]), _number(other.get(error))
                )
            )
    return rows


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
