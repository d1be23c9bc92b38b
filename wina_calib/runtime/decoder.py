"""A decoder that begins and ends passes, and layers to which their pass comes back when they are computed again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from wina_calib.errors import UsageError
from wina_calib.runtime.derived import Derived, derive
from wina_calib.runtime.first_tokens import tokens_of
from wina_calib.runtime.forward_pass import CHANGED, Pass, here
from wina_calib.runtime.state import RuntimeState

# Under this name a layer's pass travels with its arguments.
CARRIED = "wina_pass"


class Decoder(Derived):
    """Stands before the class of the module whose forward pass goes through all layers."""

    wina_state: RuntimeState
    wina_layers: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock class, in a pass."""
        state = self.wina_state
        before = state.begin(args, kwargs)
        try:
            if not torch.compiler.is_compiling():
                here.current.layers = getattr(self, self.wina_layers)
                tokens = tokens_of(args, kwargs)
                if tokens is not None and (self.training or torch.is_grad_enabled() or tokens.requires_grad):
                    state.look_for_repeats(tokens)
                if self.training:
                    self._carry_passes()
            return super().forward(*args, **kwargs)
        finally:
            state.end(before)

    def _carry_passes(self) -> None:
        """Let layers that are computed again in the backward pass take their pass along."""
        for layer in getattr(self, self.wina_layers):
            if getattr(layer, "gradient_checkpointing", False) and not isinstance(layer, Recomputed):
                derive(layer, Recomputed)


class Recomputed(Derived):
    """Stands before the class of a decoder layer that transformers checkpoints.

    Up to 5.23 what is computed again is a call, from 5.24 on the forward pass, but always with the arguments of the call.
    """

    gradient_checkpointing: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock class, with the pass among the arguments."""
        if self.gradient_checkpointing and self.training and not torch.compiler.is_compiling():
            kwargs.setdefault(CARRIED, getattr(here, "current", None))
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock class, in the pass among the arguments."""
        carried: Pass | None = kwargs.pop(CARRIED, None)
        before = getattr(here, "current", None)
        if carried is None or carried is before:
            return super().forward(*args, **kwargs)
        state: RuntimeState = carried.state
        state.gate.enter()
        try:
            if carried.revision != state.revision:
                raise UsageError(CHANGED)
            here.current = carried.again()
            return super().forward(*args, **kwargs)
        finally:
            here.current = before
            state.gate.leave()


def install(decoder: nn.Module, state: RuntimeState, layers: str) -> None:
    """Let a decoder, whose layers are its attribute `layers`, begin and end the passes of a state."""
    derive(decoder, Decoder)
    decoder.__dict__.update(wina_state=state, wina_layers=layers)
