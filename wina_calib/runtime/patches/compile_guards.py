"""How `generate` compiles the decode step of a sparse model.

Before every token torch checks thousands of facts about the model that the step was compiled for. That takes as long as
a fifth of the step, while the device waits. Most of them can only change where a program rewrites the model's classes
or attributes as it runs; here those that a user may change are kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig, PreTrainedModel

REASON = "torch checks thousands of facts about the model before every compiled step, for a fifth of its time"
VERSIONS = "torch with torch.compiler.skip_guard_on_all_nn_modules_unsafe, transformers whose models have _default_compile_config"
ELSEWHERE = "all checks are made"
# That something is absent or still the same function: attributes set on an instance, hooks, closures, classes.
UNCHECKED = frozenset({
    "BUILTIN_MATCH", "CLASS_MATCH", "CLOSURE_MATCH", "DICT_NOT_CONTAINS", "EMPTY_NN_MODULE_HOOKS_DICT", "FUNCTION_MATCH",
    "HASATTR", "MODULE_MATCH", "NOT_PRESENT_IN_GENERIC_DICT",
})  # fmt: skip
# What of a submodule is checked: its group's number stands for its weights and state.
CHECKED_ATTRIBUTES = (".number", ".start", ".training")
COMBINED = {"combo_kernels": True, "combo_kernel_allow_mixed_sizes": 2}
# Libraries whose modules keep their attributes. An adapter's are checked all: it is turned off, changed and merged by them.
KNOWN = ("torch", "transformers", "wina_calib")
# What a thread asked of the model, and the pass that it computes, if any.
OURS = re.compile(r"wina_state\.local|wina_calib_dot_runtime\w*'\]\.here")
IN_A_LIST = re.compile(r"_modules\['\d+'\]")


def needed(guard: Any) -> bool:
    """Whether a check is kept: of inputs, cache, configuration, state, and of each submodule its class and number.

    Outside of the layers also of a weight's shape, since a vocabulary may be resized.
    """
    if guard.guard_type == "HASATTR" and OURS.search(guard.name) is not None:
        return True
    if "_modules" not in guard.name or "wina_state" in guard.name:
        return guard.guard_type not in UNCHECKED
    if guard.guard_type == "TYPE_MATCH":
        return isinstance(guard.value, nn.Module)
    if guard.guard_type == "TENSOR_MATCH":
        return IN_A_LIST.search(guard.name) is None
    return bool(guard.name.endswith(CHECKED_ATTRIBUTES))


def needed_ones(guards: Sequence[Any]) -> list[bool]:
    """`needed` for each of them, as torch.compile asks; all of a module from elsewhere and of what is in it."""
    foreign = tuple({guard.name for guard in guards if guard.guard_type == "TYPE_MATCH" and _is_foreign(guard.value)})
    return [guard.name.startswith(foreign) or needed(guard) for guard in guards]


def _is_foreign(value: Any) -> bool:
    return isinstance(value, nn.Module) and type(value).__module__.partition(".")[0] not in KNOWN


def compile_config() -> CompileConfig:
    """What `generate` uses by default on CUDA, CUDA graphs included, with fewer checks where this torch can leave them out.

    On a machine without CUDA what `generate` takes as its `compile_config`: there it compiles only if it is given one.
    """
    graphs = {"triton.cudagraphs": True} | _combined() if torch.cuda.is_available() else {}
    if hasattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe"):
        config = CompileConfig(mode=None, options=graphs | {"guard_filter_fn": needed_ones})
    else:
        config = CompileConfig() if graphs else CompileConfig(mode=None)
    config._compile_all_devices = True
    return config


def _combined() -> dict[str, Any]:
    """Options by which small kernels that do not wait for each other are started as one, those that this torch has.

    Between the products of a layer a step has five that take a microsecond each, and as long to start.
    """
    from torch._inductor import config

    return {name: value for name, value in COMBINED.items() if hasattr(config, name)}


def prefer(model: PreTrainedModel) -> None:
    """Let this model be compiled so, unless `generate` is given a `compile_config`."""
    if hasattr(model, "_default_compile_config"):
        model.__dict__["_default_compile_config"] = compile_config


def compiled_call(model: PreTrainedModel) -> Any:
    """The model's compiled forward pass of one token, as `generate(cache_implementation="static")` makes it on a GPU."""
    config = getattr(model, "_default_compile_config", CompileConfig)()
    return torch.compile(model.__call__, **(config.to_dict() | {"fullgraph": True}))
