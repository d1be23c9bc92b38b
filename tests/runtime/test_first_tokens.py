"""The first token of a sequence is known by the sequence, in whatever pieces its prompt comes."""

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from transformers import DynamicCache, PreTrainedModel, StaticCache

import wina_calib
from wina_calib.errors import UsageError
from wina_calib.runtime.first_tokens import Rows

LENGTH = 14
IDS = torch.randint(4, 300, (3, LENGTH), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model(calibrated: Path) -> PreTrainedModel:
    return wina_calib.load(calibrated, 0.5)


def padded(padding: list[int]) -> torch.Tensor:
    """A mask with so much padding on the left of each row."""
    return (torch.arange(LENGTH) >= torch.tensor(padding).unsqueeze(1)).long()


@torch.no_grad()
def in_pieces(model: PreTrainedModel, mask: torch.Tensor, sizes: list[int], cache: Any, *, wide: bool) -> torch.Tensor:
    """Logits (rows, LENGTH, vocabulary) of a text that comes in pieces of these sizes, the last one repeated."""
    ids, found, start = IDS[: mask.shape[0]], [], 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    while start < LENGTH:
        stop = min(LENGTH, start + sizes[min(len(found), len(sizes) - 1)])
        found.append(
            model(
                ids[:, start:stop],
                attention_mask=mask if wide else mask[:, :stop],
                position_ids=positions[:, start:stop],
                use_cache=True,
                **tiny.given(cache),
            ).logits
        )
        start = stop
    return torch.cat(found, 1)


def cache_for(model: PreTrainedModel, kind: str) -> Any:
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=LENGTH)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    padding=st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, LENGTH), min_size=1, max_size=5),
    kind=st.sampled_from(["dynamic", "static"]),
)
def test_pieces_give_what_one_pass_gives(
    padding: list[int], sizes: list[int], kind: str, model: PreTrainedModel
) -> None:
    mask = padded(padding)
    whole = in_pieces(model, mask, [LENGTH], DynamicCache(config=model.config), wide=False)
    found = in_pieces(model, mask, sizes, cache_for(model, kind), wide=False)
    for row in range(len(padding)):
        torch.testing.assert_close(found[row, padding[row] :], whole[row, padding[row] :], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("prefill", ["dense", "sparse"])
@pytest.mark.parametrize("size", [3, 8])
def test_generate_in_pieces(kind: str, prefill: str, size: int, calibrated: Path) -> None:
    model = wina_calib.load(calibrated, 0.5, prefill=prefill)
    mask = padded([9, 0, 13])
    kwargs = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 3}
    kwargs |= {"output_logits": True, "return_dict_in_generate": True, "disable_compile": True}
    if kind == "static":
        kwargs["cache_implementation"] = kind
    whole, found = (model.generate(IDS, **kwargs, **more).logits for more in ({}, {"prefill_chunk_size": size}))
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_cache_that_is_emptied_begins_anew(model: PreTrainedModel) -> None:
    cache = StaticCache(model.config, max_cache_len=LENGTH)
    mask = padded([0])
    expected = in_pieces(model, mask, [5, 1], cache, wide=False)
    cache.reset()
    assert torch.equal(in_pieces(model, mask, [5, 1], cache, wide=False), expected)
    cache.reset()
    later = padded([7])
    found = in_pieces(model, later, [5, 1], cache, wide=False)[:, 7:]
    whole = in_pieces(model, later, [LENGTH], DynamicCache(config=model.config), wide=False)[:, 7:]
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)


def test_masks_of_all_lengths_and_kinds() -> None:
    def four() -> DynamicCache:
        cache = DynamicCache()
        cache.update(torch.zeros(2, 1, 4, 2), torch.zeros(2, 1, 4, 2), 0)
        return cache

    tokens = torch.ones(2, 3, dtype=torch.long)
    mask = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1, 1]])
    causal = torch.ones(7, 7).tril().bool() & mask.bool()[:, None]
    prepared = causal[:, None, 4:]
    prepared[0, 0, 0] = True  # a row of padding, which torch's attention lets see everything
    for given_mask in (mask, prepared, torch.where(prepared, 0.0, -torch.inf), {"full_attention": prepared}):
        rows = Rows((tokens,), {"attention_mask": given_mask, **tiny.given(four())}).first()
        assert rows is not None
        assert rows.nonzero().tolist() == [[0, 1]]
    assert Rows((tokens,), tiny.given(four())).first() is None
    one = Rows((tokens[:, :1],), {"attention_mask": mask[:, :5], **tiny.given(four())})
    assert one.first() is None


def test_sequences_side_by_side_in_one_row(model: PreTrainedModel) -> None:
    """As a collator without padding packs them: each has a first token."""
    positions = torch.tensor([[*range(6), *range(8)]])
    with torch.no_grad():
        found = model(IDS[:1], position_ids=positions, use_cache=False).logits
        apart = [model(part, use_cache=False).logits for part in (IDS[:1, :6], IDS[:1, 6:])]
    torch.testing.assert_close(found, torch.cat(apart, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "given",
    [{"attention_mask": torch.ones(1, 9, dtype=torch.long)}, {"position_ids": torch.tensor([[8]])}],
    ids=["mask", "position"],
)
@torch.no_grad()
def test_a_pass_that_goes_on_without_a_cache_is_refused(given: dict[str, torch.Tensor], model: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match="nothing tells whether it is a prompt"):
        model(IDS[:1, :1], **given)
    model(IDS[:1, :1], position_ids=torch.zeros(1, 1, dtype=torch.long))
