"""What transformers offers beside `generate` and `from_pretrained`: each works, or says in our words what to do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import wina_calib
from wina_calib.errors import RuntimeLoadError, UsageError
from wina_calib.runtime.fast_path import attention

PROMPTS = [list(range(5, 17)), list(range(50, 80)), [7]]
CONFIG = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=3, eos_token_id=-1)


@pytest.fixture
def model(calibrated: Path) -> PreTrainedModel:
    return wina_calib.load(calibrated, 0.5)


def in_batches(model: PreTrainedModel) -> list[list[int]]:
    few = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    done = model.generate_batch(PROMPTS, generation_config=CONFIG, continuous_batching_config=few)
    return [result.generated_tokens for _, result in sorted(done.items())]


def one_by_one(model: PreTrainedModel) -> list[list[int]]:
    return [model.generate(torch.tensor([p]), generation_config=CONFIG)[0, len(p) :].tolist() for p in PROMPTS]


@pytest.mark.parametrize("chosen", [None, "sdpa", "eager"])
def test_continuous_batching_gives_the_tokens_of_generate(chosen: str | None, model: PreTrainedModel) -> None:
    expected = one_by_one(model)
    if chosen is not None:
        model.set_attn_implementation(chosen)
    before = model.config._attn_implementation
    assert in_batches(model) == expected
    assert model.config._attn_implementation == before == (chosen or attention.NAME)
    assert one_by_one(model) == expected


def test_continuous_batching_has_no_dense_prompts(model: PreTrainedModel) -> None:
    wina_calib.set_prefill(model, "dense")
    with pytest.raises(UsageError, match="set_prefill"):
        in_batches(model)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_other_auto_classes_are_told_the_right_one(auto: Any, calibrated: Path) -> None:
    with pytest.raises(RuntimeLoadError, match="Load it with AutoModelForCausalLM"):
        auto.from_pretrained(calibrated)


def test_casts(model: PreTrainedModel) -> None:
    with torch.no_grad():
        expected = model(torch.tensor(PROMPTS[:1])).logits
        assert model.bfloat16().float().dtype == torch.float32
        found = wina_calib.set_sparsity(model.half(), 0.5)
        assert model.dtype == torch.float16
        assert found == pytest.approx(0.5)
        logits = model.float()(torch.tensor(PROMPTS[:1])).logits
    assert float((logits - expected).norm() / expected.norm()) < 0.1


def test_nothing_to_dequantize(model: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match="export-dense"):
        model.dequantize()


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A few texts."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(index + 4, index + 36)
        return {"input_ids": ids, "labels": ids}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # the trainer asks by an old name
@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_weights_can_be_trained(checkpointing: bool, model: PreTrainedModel, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    before = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    args = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no", gradient_checkpointing=checkpointing
    )
    Trainer(model, args, train_dataset=Rows()).train()
    assert not torch.equal(model.model.layers[1].mlp.up_proj.weight, before)
