"""Tasks of the lm-eval harness, offline, on small local task files."""

import json
from pathlib import Path

import pytest
import script
import tiny
from click.testing import CliRunner
from shared import SHARED

from wina_calib.checkpoint.export_dense import export_dense
from wina_calib.cli import main
from wina_calib.errors import UsageError
from wina_calib.studies import lm_eval_tasks
from wina_calib.studies.lm_eval_tasks import TaskScore, evaluate_tasks, render_tasks

TASK = """
task: wina_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: {target}
{more}
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
QUESTION = {"query": "Which word is a colour?", "choices": ["stone", "red", "seven"], "gold": 1}
BLANK = {"context": "A short text about", "continuation": "nothing"}


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task definitions of both kinds, on lines of arc_easy and lambada, or where those are not here, on ones like them."""
    folder = tmp_path_factory.mktemp("tasks")
    shared = SHARED / "text" / "tasks"
    here = shared.is_dir()
    (folder / "arc.jsonl").write_text("".join(json.dumps(QUESTION | {"gold": i % 3}) + "\n" for i in range(12)))
    (folder / "lambada.jsonl").write_text((json.dumps(BLANK) + "\n") * 12)
    arc = TASK.format(
        name="arc",
        file=shared / "arc_easy.jsonl" if here else folder / "arc.jsonl",
        kind="multiple_choice",
        text="{{query}}\\nAnswer:",
        target="gold",
        more='doc_to_choice: "{{choices}}"',
    )
    lambada = TASK.format(
        name="lambada",
        file=shared / "lambada_openai_small.jsonl" if here else folder / "lambada.jsonl",
        kind="loglikelihood",
        text="{{context}}",
        target='" {{continuation}}"',
        more="",
    )
    (folder / "arc.yaml").write_text(arc)
    (folder / "lambada.yaml").write_text(lambada)
    return folder


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "int4"
    tiny.calibrate(llama, folder, text, samples=80, bits=4, group_size=32)
    return folder


needs_harness = pytest.mark.filterwarnings("ignore")  # the harness and what it imports warn of their own matters


@needs_harness
def test_sparse_and_dense_side_by_side(calibrated: Path, task_files: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval; `make test-lm-eval` installs it")
    found = evaluate_tasks(
        calibrated, ["wina_arc", "wina_lambada"], sparsity=0.0, limit=10, include_path=task_files, dtype="float32"
    )
    assert {(score.task, score.metric) for score in found} >= {("wina_arc", "acc"), ("wina_lambada", "acc")}
    assert all(score.dense == score.sparse for score in found)
    assert all(0.0 <= score.sparse <= 1.0 for score in found if score.metric == "acc")
    sparse = evaluate_tasks(
        calibrated, ["wina_arc", "wina_lambada"], sparsity=0.95, limit=10, include_path=task_files, dtype="float32"
    )
    assert [score.dense for score in sparse] == [score.dense for score in found]
    assert any(score.dense != score.sparse for score in sparse)


@needs_harness
def test_a_quantized_checkpoint_solves_what_its_dense_model_does(
    quantized: Path, task_files: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval; `make test-lm-eval` installs it")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = ["wina_arc", "wina_lambada"]
    found = evaluate_tasks(quantized, tasks, sparsity=0.0, limit=40, include_path=task_files, dtype="float32")
    export_dense(quantized, tmp_path / "dense")
    plain = simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'dense'},dtype=float32",
        device="cpu",
        tasks=tasks,
        limit=40,
        task_manager=TaskManager(include_path=str(task_files)),
    )
    scores = {score.task: score for score in found if score.metric == "acc"}
    assert scores.keys() == set(tasks)
    for task, score in scores.items():
        assert score.dense == score.sparse == plain["results"][task]["acc,none"]


@needs_harness
def test_command_prints_one_table(calibrated: Path, task_files: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval; `make test-lm-eval` installs it")
    arguments = ["evaluate", str(calibrated), "--tasks", "wina_arc", "--limit", "6", "--include-path", str(task_files)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.stdout.splitlines()[:1]] == ["task"]
    assert "wina_arc" in done.stdout


@needs_harness
def test_an_unknown_task_is_named(calibrated: Path, task_files: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval; `make test-lm-eval` installs it")
    with pytest.raises(UsageError, match="no task nowhere"):
        evaluate_tasks(calibrated, ["nowhere"], include_path=task_files)


def test_the_harness_runs_on_a_checkpoint(calibrated: Path, task_files: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval; `make test-lm-eval` installs it")
    code = "import sys; from wina_calib.cli import main; main(['lm-eval', *sys.argv[1:]])"
    flags = ["run", "--model", "hf", "--model_args", f"pretrained={calibrated},dtype=float32", "--tasks", "wina_arc"]
    flags += ["--include_path", task_files, "--limit", "6", "--device", "cpu", "--output_path", tmp_path]
    done = script.run(code, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "wina_arc" in done.stdout
    assert list(tmp_path.rglob("results_*.json"))


def test_the_harness_alone_refuses_a_checkpoint(calibrated: Path, task_files: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval; `make test-lm-eval` installs it")
    code = "import sys; from lm_eval.__main__ import cli_evaluate; sys.argv[0] = 'lm_eval'; cli_evaluate()"
    flags = ["run", "--model", "hf", "--model_args", f"pretrained={calibrated}", "--tasks", "wina_arc"]
    done = script.run(code, *flags, "--include_path", task_files, "--limit", "2", "--device", "cpu")
    assert done.returncode != 0
    assert "Unknown quantization type, got wina" in done.stderr


def test_without_the_harness_it_says_what_to_install(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_tasks, "find_spec", lambda name: None)
    for arguments in (["evaluate", str(calibrated), "--tasks", "arc_easy"], ["lm-eval", "ls", "tasks"]):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 2
        assert "pip install 'wina-calib[lm-eval]'" in done.output


def test_scores_as_a_table() -> None:
    text = render_tasks([TaskScore("arc", "acc", 0.5, 0.01, 0.4, None)])
    assert text.splitlines()[2].split() == ["arc", "acc", "0.5000", "±", "0.0100", "0.4000", "-0.1000"]
