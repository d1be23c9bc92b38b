"""Looking at new tokens one step late: the rule, and that the tokens are the same."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation import utils

import wina_calib
from wina_calib.runtime.patches import late_stop

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
PROMPT = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule as transformers has it: late on one kind of device, for a cache that can be cut or is not given back."""

    def is_supported(device: torch.device, cache: Any, cache_is_returned: bool, is_assistant: bool) -> bool:
        if device.type != "mps" or is_assistant:
            return False
        return cache is None or cache.is_croppable or not cache_is_returned

    monkeypatch.setattr(utils.DeferredStopCheck, "is_supported", staticmethod(is_supported))


def late(device: torch.device, cache: object, *, returned: bool = False, assistant: bool = False) -> bool:
    return utils.DeferredStopCheck.is_supported(device, cache, returned, is_assistant=assistant)


@pytest.mark.usefixtures("stock")
def test_the_rule_is_extended_to_marked_caches_on_cuda() -> None:
    config = tiny.make("llama").config
    growing, fixed = DynamicCache(config=config), StaticCache(config=config, max_cache_len=16)
    late_stop.install()
    once = utils.DeferredStopCheck.is_supported
    late_stop.install()
    assert utils.DeferredStopCheck.is_supported is once
    assert not late(CUDA, fixed)
    for cache in (growing, fixed):
        late_stop.mark(cache, torch.empty(1, 4, device="meta"))
        assert not late(CUDA, cache)
        setattr(cache, late_stop.MARK, True)
        assert late(CUDA, cache)
        assert not late(CPU, cache)
        assert not late(CUDA, cache, assistant=True)
    assert late(CUDA, growing, returned=True)
    assert late(CUDA, fixed, returned=True) is fixed.is_croppable  # which some transformers say of a static one too
    assert late(torch.device("mps"), None)
    assert not late(CUDA, None)


def test_a_device_that_transformers_comes_to_name_stays_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_cuda_alone(device: torch.device, cache: Any, cache_is_returned: bool, is_assistant: bool) -> bool:
        return device.type == "cuda"

    monkeypatch.setattr(utils.DeferredStopCheck, "is_supported", staticmethod(on_cuda_alone))
    late_stop.install()
    cache = DynamicCache(config=tiny.make("llama").config)
    setattr(cache, late_stop.MARK, True)
    assert late(CUDA, cache)
    assert not late(CPU, cache)


def test_another_rule_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def newer(device: torch.device, cache: Any, **more: Any) -> bool:
        return False

    monkeypatch.setattr(utils.DeferredStopCheck, "is_supported", staticmethod(newer))
    late_stop.install()
    assert utils.DeferredStopCheck.is_supported is newer
    monkeypatch.delattr(utils, "DeferredStopCheck")
    late_stop.install()


def test_this_transformers_has_the_rule_that_is_known(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    assert hasattr(utils.DeferredStopCheck.is_supported, late_stop.MARK)
    out = model.generate(PROMPT, max_new_tokens=3, return_dict_in_generate=True, do_sample=False)
    assert not hasattr(tiny.cache_of(out), late_stop.MARK)  # on a CPU nothing is late


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch makes one to start its graph pool with
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_tokens_are_the_same(calibrated: Path, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wina_calib.load(calibrated).to("cuda", torch.bfloat16)
    options = {"do_sample": False, "cache_implementation": implementation, "pad_token_id": 3}
    prompt = torch.cat([PROMPT, PROMPT.flip(1)]).cuda()
    made = []

    class Counted(utils.DeferredStopCheck):
        def __init__(self, *args: object, **kwargs: object) -> None:
            made.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(utils, "DeferredStopCheck", Counted)
    long = model.generate(prompt, max_new_tokens=24, eos_token_id=None, **options)
    assert made
    for end in {int(long[0, 7]), int(long[1, 12]), int(long[0, -1])}:
        found = model.generate(prompt, max_new_tokens=24, eos_token_id=end, **options)
        with monkeypatch.context() as context:
            context.setattr(Counted, "is_supported", staticmethod(lambda *args, **kwargs: False))
            expected = model.generate(prompt, max_new_tokens=24, eos_token_id=end, **options)
        assert torch.equal(found, expected)
