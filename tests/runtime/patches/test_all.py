"""Every patch says why it is there, and without what it changes the library's own way is taken."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CompileConfig
from transformers.generation import utils
from transformers.generation.continuous_batching import continuous_api

import wina_calib
from wina_calib.runtime import patches
from wina_calib.runtime.fast_path import attention
from wina_calib.runtime.patches import compile_guards, continuous_batching, late_stop, triton_launch

NAMES = sorted(path.stem for path in Path(patches.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_each_says_why(name: str) -> None:
    module = import_module(f"wina_calib.runtime.patches.{name}")
    assert all(isinstance(getattr(module, part), str) for part in ("REASON", "VERSIONS", "ELSEWHERE"))
    assert f"| `{name}` |" in (patches.__doc__ or "")


def test_no_rule_of_late_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(utils, "DeferredStopCheck")
    late_stop.install()
    assert not hasattr(utils, "DeferredStopCheck")


def test_no_filter_of_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compile_guards.compile_config().to_dict()["options"]["guard_filter_fn"] is compile_guards.needed_ones
    monkeypatch.delattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe")
    assert "guard_filter_fn" not in (compile_guards.compile_config().options or {})


def test_no_default_of_compilation() -> None:
    model: Any = torch.nn.Linear(2, 2)
    compile_guards.prefer(model)
    assert "_default_compile_config" not in model.__dict__
    model._default_compile_config = CompileConfig
    compile_guards.prefer(model)
    assert model._default_compile_config is compile_guards.compile_config


def test_no_switch_of_attention(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = continuous_api.ContinuousBatchingManager
    monkeypatch.delattr(manager, "switch_to_cb_friendly_attn")
    continuous_batching.install(attention.NAME, attention.STOCK)
    assert not hasattr(manager, "switch_to_cb_friendly_attn")
    monkeypatch.setitem(sys.modules, continuous_api.__name__, None)
    continuous_batching.install(attention.NAME, attention.STOCK)
    assert wina_calib.load(calibrated).config._attn_implementation == attention.NAME


@pytest.mark.parametrize(
    ("version", "interpreted", "direct"),
    [
        ("3.6.0", False, True),
        ("3.9.1+git", False, True),
        ("3.5.1", False, False),
        ("4.0.0", False, False),
        ("3.6.0", True, False),
    ],
)
def test_triton_of_another_version(
    version: str, interpreted: bool, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton: Any = ModuleType("triton")
    triton.__version__ = version
    triton.knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=interpreted))
    monkeypatch.setitem(sys.modules, "triton", triton)
    triton_launch._starts_directly.cache_clear()
    assert triton_launch._starts_directly() is direct
    calls = []

    class Kernel:
        arg_names = ("x",)

        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            return lambda *given, **constants: calls.append((grid, given, constants))

    x = torch.zeros(64)
    if not direct:
        assert triton_launch.start_kernel(Kernel(), (1, 1, 1), (x,), BLOCK=8)[1] == ()
        assert calls == [((1, 1, 1), (x,), {"BLOCK": 8})]
    triton_launch._starts_directly.cache_clear()
