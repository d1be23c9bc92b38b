"""Recovery end to end on a tiny model: nearer to the dense one, the asked sparsity, resumed as if never stopped."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

import wina_calib
from wina_calib.budgets import Target
from wina_calib.calibration.apply_budget import apply
from wina_calib.calibration.cost import CLOSED_LOOP_PASSES
from wina_calib.calibration.loss_curves import CURVE_PASSES, usable_tokens
from wina_calib.calibration.rebudget import Request, choose
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.cli import main
from wina_calib.commands.recover import table
from wina_calib.common.progress import Silent
from wina_calib.errors import CorpusError, NumericError, OutputError, StateError, UsageError
from wina_calib.recovery.masked_model import MaskedModel
from wina_calib.recovery.options import RecoverOptions
from wina_calib.recovery.plan import plan_training
from wina_calib.recovery.record import merit
from wina_calib.recovery.result import calibration_passes
from wina_calib.recovery.run import _base, recover
from wina_calib.recovery.train import Training
from wina_calib.runtime.load import runtime_state

IDS = torch.randint(4, 300, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A tiny model whose predictions are sharp enough for masks to change them."""
    folder = tmp_path_factory.mktemp("recovery")
    model = tiny.make("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    model.save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    chosen = {
        "transform": "none",
        "budget": "uniform",
        "grid": (0.5, 0.65),
        "sparsity": 0.5,
        "samples": 64,
        "seq_len": 128,
    }
    wina_calib.calibrate(folder / "model", folder / "sparse", data=str(text), **chosen)
    return folder / "sparse"


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wina_calib.recovery.run.MEASURED_TOKENS", 256)


@pytest.fixture
def options(text: Path, calibrated: Path) -> dict[str, Any]:
    return {
        "base": str(calibrated.parent / "model"),
        "data": str(text),
        "tokens": 12 * 4 * 64,
        "seq_len": 64,
        "batch": 4,
        "lr": 3e-4,
    }


def dense(calibrated: Path, folder: Path) -> Any:
    from wina_calib.checkpoint.export_dense import export_dense

    export_dense(calibrated, folder)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


def test_the_masks_in_training_are_those_of_the_runtime(calibrated: Path, tmp_path: Path) -> None:
    model = dense(calibrated, tmp_path / "dense")
    masks = MaskedModel(model, open_checkpoint(calibrated), (0.5, 0.65))
    sparse = wina_calib.load(calibrated)
    runtime_state(sparse).kernels = "reference"
    with torch.no_grad():
        for sparsity in (0.5, 0.65):
            wina_calib.set_sparsity(sparse, sparsity)
            masks.sparsity = sparsity
            torch.testing.assert_close(model(IDS).logits, sparse(IDS).logits, atol=1e-5, rtol=1e-5)
        masks.sparsity = None
        assert not torch.allclose(model(IDS).logits, sparse(IDS).logits, atol=1e-3)


def test_computing_layers_again_gives_the_same_gradients(calibrated: Path, tmp_path: Path) -> None:
    model = dense(calibrated, tmp_path / "dense")
    masks = MaskedModel(model, open_checkpoint(calibrated), (0.5,))
    masks.sparsity, masks.follows = 0.5, True
    found = []
    for again in (False, True):
        if again:
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(
                {"use_reentrant": False}
            )
        model.train()
        model.zero_grad()
        model(IDS).logits.square().mean().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_recovering_brings_the_dense_model_nearer(calibrated: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    found = recover(calibrated, tmp_path / "out", sparsities=(0.5, 0.65), **options)
    for sparsity in (0.5, 0.65):
        assert found.after["trained on"][sparsity].kl < 0.95 * found.before["trained on"][sparsity].kl
    assert merit(found.trained.kept, found.trained.held_out[0]) < 1
    facts = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["provenance"]
    assert facts["recovered"]["sparsities"] == [0.5, 0.65]
    assert facts["recovered"]["steps"] == 12
    assert wina_calib.evaluate(tmp_path / "out", data=options["data"], tokens=4096).model_sparsity == pytest.approx(
        0.5, abs=0.02
    )
    assert facts["recovered"].keys() == {
        "steps",
        "skipped",
        "seconds",
        "held_out",
        "best",
        "share",
        "kept",
        "sparsities",
        "tokens",
        "data",
    }
    assert len(found.trained.losses) == 12
    assert not list(tmp_path.glob(".*"))
    card = (tmp_path / "out/README.md").read_text()
    assert "trained under masks" in card
    assert re.search(r"12 steps on 3,072 tokens of `text.txt`, \d+ s, under masks at 50%, 65%", card)
    told = CliRunner().invoke(main, ["export-dense", str(tmp_path / "out"), "-o", str(tmp_path / "plain")]).output
    assert re.search(
        r"Its weights were trained \(wina-calib recover: 12 steps on .*another model than the base model", told
    )
    base = str(calibrated.parent / "model")
    assert str(_base(RecoverOptions(), open_checkpoint(tmp_path / "out"))) == base  # found where it was


def test_a_first_look_is_recovered_with_enough_text(
    calibrated: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = shutil.copytree(calibrated, tmp_path / "sparse")
    config = json.loads((given / "config.json").read_text())
    config["quantization_config"]["provenance"]["samples"] = 2  # fewer than any calibration but `--quick` takes
    (given / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    found = recover(given, "out", **options)
    assert found.to_dict()["folder"] == "out" and str(tmp_path) not in table(found)  # as it was given


def test_calibrating_counts_as_much_as_it_reads(calibrated: Path) -> None:
    opened = open_checkpoint(calibrated)
    tokens = 64 * 128
    fitted = tokens * (1 + 2 * CLOSED_LOOP_PASSES)
    assert calibration_passes(opened, (0.5,)) == pytest.approx(fitted + usable_tokens(tokens) * CURVE_PASSES)
    assert calibration_passes(opened, (0.4, 0.5)) > calibration_passes(opened, (0.5,))


def test_another_tokenizer_is_refused(calibrated: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    shutil.copytree(calibrated.parent / "model", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))  # nothing before a text
    with pytest.raises(UsageError, match="another tokenizer"):
        recover(calibrated, tmp_path / "out", **options | {"base": str(tmp_path / "model")})


class StopAt(Silent):
    """Ctrl-C after some steps of the training."""

    def __init__(self, steps: int) -> None:
        self.left, self.trains = steps, False

    def phase(self, name: str, steps: int) -> None:
        self.trains = name == "train"

    def step(self, note: str) -> None:
        self.left -= self.trains
        if self.trains and self.left < 0:
            raise KeyboardInterrupt


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    calibrated: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wina_calib.storage.resume.PATIENCE", 0.0)
    monkeypatch.setattr("wina_calib.recovery.train.SAVE_AFTER", 0.0)
    whole = recover(calibrated, tmp_path / "whole", **options)
    for steps in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            recover(calibrated, tmp_path / "parts", progress=StopAt(steps), **options)
        assert not (tmp_path / "parts").exists()
    parts = recover(calibrated, tmp_path / "parts", **options)
    assert parts.trained.held_out == whole.trained.held_out
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()


@pytest.mark.parametrize("what", ["text", "calibration", "memory"])
def test_a_run_does_not_go_on_with_other_work(
    what: str,
    calibrated: Path,
    tmp_path: Path,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wina_calib.storage.resume.PATIENCE", 0.0)
    monkeypatch.setattr("wina_calib.recovery.train.SAVE_AFTER", 0.0)
    given, text = shutil.copytree(calibrated, tmp_path / "sparse"), tmp_path / "text.txt"
    shutil.copyfile(options["data"], text)
    options |= {"data": str(text)}
    with pytest.raises(KeyboardInterrupt):
        recover(given, tmp_path / "out", progress=StopAt(3), **options)
    if what == "text":
        text.write_text(text.read_text()[5000:])
    elif what == "calibration":
        opened = open_checkpoint(given)
        apply(choose(opened, Request(target=Target("sparsity", 0.55))), opened)
    else:
        monkeypatch.setattr(
            "wina_calib.recovery.run.plan_training", lambda *given: replace(plan_training(*given), adapters=True)
        )
    with pytest.raises(
        StateError, match="checkpoint.calibration" if what == "calibration" else "cannot be gone on with"
    ):
        recover(given, tmp_path / "out", **options)


def test_steps_that_are_no_numbers_are_left_out_then_end_it(
    calibrated: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, bad = Training._step, {2}

    def sometimes(self: Training, distiller: Any, number: int) -> torch.Tensor:
        if number in bad:
            for p in self._weights.values():
                p.register_hook(lambda grad: grad * math.nan)
        return step(self, distiller, number)

    monkeypatch.setattr(Training, "_step", sometimes)
    with pytest.raises(NumericError, match="lower --lr"):
        recover(calibrated, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_it_never_gives_back_worse_than_it_was_given(calibrated: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    found = recover(calibrated, tmp_path / "out", **options | {"lr": 0.9, "tokens": 4 * 4 * 64})
    assert found.trained.best == 0
    assert found.after["trained on"][0.5].kl < 1.1 * found.before["trained on"][0.5].kl


def test_weights_count_as_better_only_where_no_sparsity_is_worse_off() -> None:
    assert merit([0.1, 0.5], [0.2, 1.0]) == 0.5
    assert merit([0.21, 0.1], [0.2, 1.0]) == math.inf
    assert merit([0.0, 0.5], [0.0, 1.0]) == 0.75


def test_adapters_are_merged(calibrated: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    found = recover(calibrated, tmp_path / "out", train="adapters", rank=8, **options)
    assert found.plan.adapters
    assert found.after["trained on"][0.5].kl < found.before["trained on"][0.5].kl
    assert not any("lora" in name for name in open_checkpoint(tmp_path / "out").shards)


def test_text_of_the_model_itself_will_do(calibrated: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    found = recover(calibrated, tmp_path / "out", **options | {"data": "self", "tokens": 6 * 4 * 64})
    assert merit(found.trained.kept, found.trained.held_out[0]) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 10}, "at least one sequence"),
        ({"sparsities": (0.5, 1.0)}, "in \\(0, 1\\)"),
        ({"bits": 3}, "bits is 3"),
        ({"lr": 2.0}, "lr is 2"),
        ({"data": ("self", "builtin")}, "no other data"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RecoverOptions(**changes)


def test_the_result_has_the_site_sparsities_that_were_trained(
    tmp_path: Path, text: Path, options: dict[str, Any], calibrated: Path
) -> None:
    chosen = {"transform": "none", "grid": (0.5, 0.65), "sparsity": 0.5, "samples": 64, "seq_len": 128}
    wina_calib.calibrate(calibrated.parent / "model", tmp_path / "global", data=str(text), budget="global", **chosen)
    recover(tmp_path / "global", tmp_path / "out", sparsities=(0.5, 0.65), **options | {"tokens": 2 * 4 * 64})
    given, made = open_checkpoint(tmp_path / "global"), open_checkpoint(tmp_path / "out")
    for sparsity in (0.5, 0.65):
        np.testing.assert_allclose(made.sparsities(sparsity), given.sparsities(sparsity), atol=1e-6)
    assert not np.allclose(given.sparsities(0.65), 1 - (1 - given.sparsities(0.5)) * 0.7, atol=0.01)


def test_training_with_quantization_is_better_than_quantizing_afterwards(
    calibrated: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    form = {"bits": 4, "group_size": 32}
    found = recover(calibrated, tmp_path / "out", **options | form | {"tokens": 40 * 4 * 64, "lr": 1e-3})
    assert open_checkpoint(tmp_path / "out").settings.bits == 4
    kept = found.trained.held_out
    assert kept[found.trained.best][0] < 0.9 * kept[0][0]  # both with weights of 4 bits
    assert found.after["trained on"][0.5].kl < kept[0][0]


def test_bits_that_do_not_fit_the_model_are_refused_before_the_work(
    calibrated: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="do not divide into groups of 64"):
        recover(calibrated, tmp_path / "out", **options | {"bits": 4, "group_size": 64})


def test_too_little_text_is_refused(calibrated: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    (tmp_path / "short.txt").write_text("only a few words")
    with pytest.raises(CorpusError, match="short.txt"):
        recover(calibrated, tmp_path / "out", **options | {"data": str(tmp_path / "short.txt")})
    assert not (tmp_path / "out").exists()


def test_a_base_model_that_is_not_there_is_named(
    calibrated: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(UsageError, match="Give it with --base"):
        patched.setattr("wina_calib.recovery.run.base_model_here", lambda *_: None)
        recover(calibrated, tmp_path / "out", **options | {"base": None})
    with pytest.raises(UsageError, match="no-such-model.*Give it with --base"):
        recover(calibrated, tmp_path / "out", **options | {"base": str(tmp_path / "no-such-model")})


def test_a_checkpoint_without_weights_is_refused(
    llama: Path, text: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    tiny.calibrate(llama, tmp_path / "reference", text, weights="reference")
    with pytest.raises(UsageError, match="has no weights of its own"):
        recover(tmp_path / "reference", tmp_path / "out", **options)


def test_a_full_disk_at_the_end_keeps_what_was_saved(
    calibrated: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wina_calib.storage.resume.PATIENCE", 0.0)
    monkeypatch.setattr("wina_calib.recovery.train.SAVE_AFTER", 0.0)

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    short = options | {"tokens": 4 * 4 * 64}
    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(OutputError, match="disk is full"):
            recover(calibrated, tmp_path / "out", **short)
    assert not (tmp_path / "out").exists()
    seen = StopAt(1000)
    found = recover(calibrated, tmp_path / "out", progress=seen, **short)
    assert found.trained.steps == 4
    assert seen.left == 1000  # no step was done again


def test_time_that_is_short_is_planned_for(
    calibrated: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Training, "_fitting", lambda *_: 6)
    found = recover(calibrated, tmp_path / "out", **options | {"max_time": 1.0})
    assert found.trained.steps == 6
    assert set(found.trained.held_out) == {0, 6}  # the middle had passed when it was known


def test_steps_are_given_to_sparsities_in_turn() -> None:
    assert RecoverOptions(sparsities=(0.4, 0.65), turns=(1, 2)).in_turn == (0.4, 0.65, 0.65)
    assert RecoverOptions(sparsities=(0.4, 0.65)).in_turn == (0.4, 0.65)
    with pytest.raises(UsageError, match="turns are"):
        RecoverOptions(sparsities=(0.4, 0.65), turns=(1,))


def test_weights_spread_over_processes_are_refused(
    calibrated: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="FSDP is set"):
        recover(calibrated, tmp_path / "out", **options)


def test_tasks_are_solved_before_and_after(calibrated: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    file = tmp_path / "letters.jsonl"
    file.write_text(json.dumps({"query": "Which?", "choices": ["a", "b"], "gold": 1}) + "\n")
    found = recover(calibrated, tmp_path / "out", tasks=file, **options | {"tokens": 2 * 4 * 64})
    assert found.tasks_before["letters"].keys() == found.tasks_after["letters"].keys() == {0.0, 0.5}
    assert found.tasks_before["letters"][0.0] == found.tasks_after["letters"][0.0]
    assert found.to_dict()["tasks_after"]["letters"]["0.5"] in (0.0, 1.0)
    assert "letters" in table(found)


def test_less_of_the_way_is_taken_where_it_is_better(
    calibrated: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = Training._held_out_losses, []

    def judged(self: Training) -> list[float]:
        """As if 80 % of the way were best, wherever it leads."""
        moved = sum(float((p - self._start[name]).norm()) ** 2 for name, p in self._weights.items()) ** 0.5
        seen.append(moved)
        return whole(self) if moved == 0 else [1e-3 * (2 - (len(seen) == 4)) for _ in self.sparsities]

    monkeypatch.setattr(Training, "_held_out_losses", torch.no_grad()(judged))
    found = recover(calibrated, tmp_path / "out", **options)
    assert (found.trained.best, found.trained.share) == (12, 0.8)
    assert seen[3] == pytest.approx(0.8 * seen[2], rel=1e-3)
    assert seen[4] == pytest.approx(0.6 * seen[2], rel=1e-3)
    assert "80% of the way" in table(found)
    assert "more like the dense one" not in table(replace(found, after=found.before))
    kind, ((sparsity, before), *_) = next((kind, list(by.items())) for kind, by in found.before.items())
    odd = replace(before, ppl=before.ppl * 1.1, kl=before.kl / 2)
    told = table(replace(found, after=found.before | {kind: found.before[kind] | {sparsity: odd}}))
    assert "the model answers more like the dense one" in told and "(KL) is higher after" not in told
    worse = replace(before, kl=before.kl + 0.01)
    told = table(replace(found, after=found.before | {kind: found.before[kind] | {sparsity: worse}}))
    assert f"(KL) is higher after: {kind}. There the checkpoint from before is the better one" in told


def test_held_out_text_is_looked_at_with_thresholds_that_fit_the_weights(
    calibrated: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = Training._held_out_losses, []

    def twice(self: Training) -> list[float]:
        """As it is, and from thresholds of other weights, which drop next to nothing."""
        losses = whole(self)
        for name, cut in self.masks.state().items():
            if "@" in name:
                cut.fill_(1e-9)
        seen.append((losses[0], whole(self)[0]))
        return losses

    monkeypatch.setattr(Training, "_held_out_losses", torch.no_grad()(twice))
    recover(calibrated, tmp_path / "out", **options | {"tokens": 2 * 4 * 64})
    for losses, again in seen:
        assert again == pytest.approx(losses, rel=0.03)


def test_a_run_that_died_when_all_was_done_is_found_finished(
    calibrated: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        pass

    def dies(state: Path) -> None:
        raise Died

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr("wina_calib.recovery.run.drop", dies)
        recover(calibrated, tmp_path / "out", **options | {"tokens": 4 * 4 * 64})
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.state"}
    with pytest.raises(OutputError, match="was finished already; what was left of its making is removed"):
        recover(calibrated, tmp_path / "out", **options | {"tokens": 4 * 4 * 64})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    open_checkpoint(tmp_path / "out").verify_weights()
