"""Weights that are quantized in the forward pass and trained as if they were not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wina_calib.model.architecture import Architecture
from wina_calib.quantization.formats import WeightFormat
from wina_calib.quantization.scales import quantize_nearest


class StraightThrough(nn.Module):
    """A weight (out, in) as its format holds it; the gradient goes to the weight itself."""

    def __init__(self, form: WeightFormat) -> None:
        super().__init__()
        self.form = form

    def forward(self, weight: Tensor) -> Tensor:
        """The quantized weight (out, in)."""
        with torch.no_grad():
            near = quantize_nearest(weight.detach().t().float(), self.form).whole(torch.float32).to(weight.dtype)
        return weight + (near - weight).detach()


def quantize_in_training(model: nn.Module, arch: Architecture, form: WeightFormat) -> None:
    """From now on compute with every projection's weight as `form` would hold it."""
    for layer, site in arch.sites:
        for projection in site.projections:
            module = model.get_submodule(layer.prefix + projection.module)
            parametrize.register_parametrization(module, "weight", StraightThrough(form), unsafe=True)


def stop_quantizing(model: nn.Module) -> None:
    """Give the projections their own weights back, trained."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            own = module.parametrizations["weight"].original  # type: ignore[index, union-attr]  # torch's types are too narrow
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            assert module.weight is own
