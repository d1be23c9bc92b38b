"""Recovery end to end on a tiny model: nearer to the dense one, the asked sparsity, resumed as if never stopped."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import wina_calib
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.common.progress import Silent
from wina_calib.errors import NumericError, UsageError
from wina_calib.quantization.formats import WeightFormat
from wina_calib.recovery.masked_model import MaskedModel
from wina_calib.recovery.options import RecoverOptions
from wina_calib.recovery.plan import Size, plan_training
from wina_calib.recovery.run import recover
from wina_calib.recovery.straight_through import quantize_in_training, stop_quantizing
from wina_calib.recovery.train import Training, merit
from wina_calib.runtime.load import runtime_state

IDS = torch.randint(4, 300, (2, 24), generator=torch.Generator().manual_seed(0))
SIZE = Size(
    weights=10**9,
    trained=8 * 10**8,
    projections=10**6,
    layers=24,
    width=2048,
    inner=8192,
    vocabulary=150_000,
    itemsize=2,
)


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


def test_thresholds_follow_what_is_seen(calibrated: Path, tmp_path: Path) -> None:
    model = dense(calibrated, tmp_path / "dense")
    masks = MaskedModel(model, open_checkpoint(calibrated), (0.5,))
    masks.sparsity, masks.follows = 0.5, True
    before = {name: float(cut) for name, cut in masks.state().items() if "@" in name}
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.mul_(3.0)  # all scores of attn_in are three times as high
        for _ in range(40):
            model(IDS)
            masks.follow()
    for name, cut in masks.state().items():
        if "attn_in" in name and "@" in name:
            assert 2 < float(cut) / before[name] < 4


def test_recovering_brings_the_dense_model_nearer(calibrated: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    found = recover(calibrated, tmp_path / "out", sparsities=(0.5, 0.65), **options)
    for sparsity in (0.5, 0.65):
        assert found.after["trained on"][sparsity].kl < 0.95 * found.before["trained on"][sparsity].kl
    assert merit(found.trained.held_out[found.trained.best], found.trained.held_out[0]) < 1
    facts = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["provenance"]
    assert facts["recovered"]["sparsities"] == [0.5, 0.65]
    assert facts["recovered"]["steps"] == 12
    assert wina_calib.evaluate(tmp_path / "out", data=options["data"], tokens=4096).model_sparsity == pytest.approx(
        0.5, abs=0.02
    )
    assert not list(tmp_path.glob(".*"))
    assert "trained under masks" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(UsageError, match="Give it with --base"):
        recover(tmp_path / "out", tmp_path / "again", **options | {"base": None})


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
    whole = recover(calibrated, tmp_path / "whole", **options)
    for steps in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            recover(calibrated, tmp_path / "parts", progress=StopAt(steps), **options)
        assert not (tmp_path / "parts").exists()
    parts = recover(calibrated, tmp_path / "parts", **options)
    assert parts.trained.held_out == whole.trained.held_out
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()


def test_steps_that_are_no_numbers_are_left_out_then_end_it(
    calibrated: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, bad = Training._step, {2}

    def sometimes(self: Training, distiller: Any, optimizer: Any, number: int) -> float:
        if number in bad:
            for p in self._weights.values():
                p.register_hook(lambda grad: grad * math.nan)
        return step(self, distiller, optimizer, number)

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
    assert merit(found.trained.held_out[found.trained.best], found.trained.held_out[0]) <= 1


def test_quantized_weights_are_trained_straight_through() -> None:
    model = tiny.make("llama")
    from wina_calib.model.architecture import describe

    own = model.model.layers[0].mlp.up_proj.weight
    quantize_in_training(model, describe(model), WeightFormat(4, 32))
    seen = model.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(seen, own)
    model(IDS).logits.square().mean().backward()
    assert own.grad is not None
    assert float(own.grad.abs().sum()) > 0
    stop_quantizing(model)
    assert model.model.layers[0].mlp.up_proj.weight is own


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


def test_a_plan_takes_what_fits() -> None:
    options = RecoverOptions()
    large = plan_training(SIZE, options, 100 << 30)
    assert (large.adapters, large.micro_batch) == (False, 8)
    assert plan_training(SIZE, options, 12 << 30).adapters
    with pytest.raises(UsageError, match=r"needs about .* GB .* 1\.1 GB is available"):
        plan_training(SIZE, options, 1 << 30)
    with pytest.raises(UsageError, match="available"):
        plan_training(SIZE, RecoverOptions(train="all"), 12 << 30)
