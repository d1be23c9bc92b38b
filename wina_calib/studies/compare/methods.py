"""The methods that `compare` knows: each a named set of calibration options over one protocol.

Thresholds of all of them are fitted in closed loop and the first token is dense, unless a method says otherwise: what is
compared is what they drop, not how well they meet the asked sparsity.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from wina_calib.calibration.options import CalibrateOptions, make_options
from wina_calib.choices import BUDGETS
from wina_calib.errors import UsageError

PAPERS, QUANTIZED = "papers", "quantized"
_OF_TEXT = frozenset({"data", "samples", "seq_len", "seed"})  # options that no site is needed for
_SPARSITY = 0.4  # whose masks weights are quantized under


@dataclass(frozen=True)
class Method:
    """One way to choose what is dropped.

    Raises:
        UsageError: an option is unknown or out of range, or of sites where there are none.
    """

    name: str  # in files and tables; letters, digits and dashes
    about: str  # one line for people
    # fields of `CalibrateOptions` that differ from the defaults; all else is the protocol's
    options: Mapping[str, Any] = field(default_factory=dict)
    group: str = PAPERS  # `papers`, `quantized`, or what an ablation changes
    share: float = 1.0  # share of the protocol's calibration blocks that it uses
    gated: bool = False  # masks are made from the MLP's gate, as CATS does; options of sites are refused

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        try:
            make_options(dict(self.options))
        except UsageError as error:
            raise UsageError(f"method {self.name!r:.80}: {error}") from None
        if self.gated and (without := sorted(set(self.options) - _OF_TEXT)):
            raise UsageError(
                f"method {self.name!r:.80} masks the MLP's gate, the same share in every layer; it has no use for "
                f"{', '.join(without)}. Leave {'them' if without[1:] else 'it'} out."
            )

    @property
    def budget(self) -> str:
        """How its sparsity is spread over sites, of a file or folder its name; it is never another one than this."""
        return "uniform over layers" if self.gated else Path(self.options.get("budget", CalibrateOptions.budget)).name


_FREE: dict[str, Any] = {"transform": "none", "budget": "uniform"}
OURS = Method("ours", "the defaults: free transform, joint norm, one mask a site, budgets by predicted loss")
_PROSE = ("builtin:fiction", "builtin:encyclopaedic", "builtin:essay", "builtin:news")
_TABLE = (
    OURS,
    Method("wina", "magnitude times joint column norm, one mask a site; no transform, uniform budget", _FREE),
    Method(
        "wina-paper",
        "WINA as published: paper's transform with run-time matrices, a mask a projection, norms on k and gate, top-k, greedy",
        {"transform": "paper", "masks": "per-projection", "select": "topk", "budget": "greedy"},
    ),
    Method(
        "wina-paper-uniform",
        "WINA as published with a uniform budget",
        {"transform": "paper", "masks": "per-projection", "select": "topk", "budget": "uniform"},
    ),
    Method(
        "teal",
        "TEAL: magnitudes, thresholds, greedy budget",
        {"score": "teal", "transform": "none", "budget": "greedy"},
    ),
    Method("teal-uniform", "TEAL with a uniform budget", _FREE | {"score": "teal"}),
    Method(
        "rsparse", "norms on all seven projections, a mask each; uniform budget", _FREE | {"masks": "per-projection"}
    ),
    Method("cats", "CATS: the gate's activation masks up's outputs and down's inputs", gated=True),
    Method("weight", "column norms alone: the same inputs for every token", _FREE | {"score": "weight"}),
    Method("random", "any inputs", _FREE | {"score": "random"}),
    Method("int8", "ours with weights in 8 bits, a scale an output", {"bits": 8, "sparsity": _SPARSITY}, QUANTIZED),
    Method(
        "int4",
        "ours with weights in 4 bits, groups of 64 outputs; quantized under the masks of 40 %",
        {"bits": 4, "sparsity": _SPARSITY},
        QUANTIZED,
    ),
    Method("int4-32", "the same in groups of 32", {"bits": 4, "group_size": 32, "sparsity": _SPARSITY}, QUANTIZED),
    Method("score-weight", "column norms alone", {"score": "weight"}, "score"),
    Method("score-activation", "magnitudes alone", {"score": "teal"}, "score"),
    Method("score-half", "magnitude times root of the norm", {"exponent": 0.5}, "score"),
    Method("score-double", "magnitude times square of the norm", {"exponent": 2.0}, "score"),
    Method("masks-each", "a mask for each projection", {"masks": "per-projection"}, "masks"),
    Method("select-topk", "each token's highest scores", {"select": "topk"}, "selection"),
    Method("transform-none", "no transform", {"transform": "none"}, "transform"),
    Method("transform-head", "value heads rotated, free", {"transform": "head"}, "transform"),
    Method("transform-global", "residual stream rotated, free", {"transform": "global"}, "transform"),
    Method(
        "transform-stacked", "each site rotated at run time, all its projections", {"transform": "stacked"}, "transform"
    ),
    Method("transform-paper", "each site rotated at run time, k or gate", {"transform": "paper"}, "transform"),
    Method("budget-uniform", "the same sparsity everywhere", {"budget": "uniform"}, "budget"),
    Method("budget-greedy", "the papers' block-wise greedy", {"budget": "greedy"}, "budget"),
    Method("loop-open", "thresholds from the dense model's inputs", {"loop": "open"}, "loop"),
    Method("first-masked", "the first token masked too", {"first_token": "sparse"}, "first token"),
    Method("text-half", "half of the calibration text", group="amount of text", share=0.5),
    Method("text-quarter", "a quarter of it", group="amount of text", share=0.25),
    Method("text-code", "calibrated on built-in code", {"data": ("builtin:code",)}, "kind of text"),
    Method("text-prose", "calibrated on built-in prose", {"data": _PROSE}, "kind of text"),
    Method("text-builtin", "calibrated on all built-in text", {"data": ("builtin",)}, "kind of text"),
)
METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _TABLE})
GROUPS: Mapping[str, tuple[Method, ...]] = MappingProxyType(
    {
        PAPERS: tuple(m for m in _TABLE if m.group == PAPERS),
        QUANTIZED: (OURS, *(m for m in _TABLE if m.group == QUANTIZED)),
        "ablation": (OURS, *(m for m in _TABLE if m.group not in (PAPERS, QUANTIZED))),
    }
)


def find_methods(names: Sequence[str | Method]) -> tuple[Method, ...]:
    """Methods by their names or their groups' (`papers`, `quantized`, `ablation`), each once, in order.

    A `Method` stands for itself. A name or group after a minus is taken out of those before it: `papers`, `-teal`.

    Raises:
        UsageError: a name is not known.
    """
    methods: dict[str, Method] = {}
    for name in names:
        if isinstance(name, Method):
            methods[name.name] = name
            continue
        plain = name.removeprefix("-")
        chosen = GROUPS.get(plain) or ((METHODS[plain],) if plain in METHODS else ())
        if not chosen:
            raise UsageError(
                f"method {plain!r:.80} is unknown.{_hint(plain)} "
                "`wina-calib compare --list` tells all, their groups and their budgets."
            )
        if name == plain:
            methods |= {method.name: method for method in chosen}
        else:
            methods = {key: method for key, method in methods.items() if method not in chosen}
    if not methods:
        raise UsageError(f"no method was given; known: {', '.join((*METHODS, *GROUPS))}.")
    return tuple(methods.values())


def _hint(name: str) -> str:
    """What may have been meant by a method's name that is none; a budget in it is answered with what methods have."""
    stem, _, last = name[:60].rpartition("-")
    budget = difflib.get_close_matches(last, BUDGETS, n=1, cutoff=0.7)
    near = difflib.get_close_matches(name[:60], (*METHODS, *GROUPS), n=1, cutoff=0.6 if not budget else 0.9)
    if near:
        return f" Did you mean {near[0]!r}?"
    alike = [m for m in METHODS.values() if (m.name.startswith(stem) if stem else m.budget in budget)]
    if not (budget and alike):
        return ""
    return f" A method has its own budget: {', '.join(f'{m.name} has {m.budget}' for m in alike)}."
