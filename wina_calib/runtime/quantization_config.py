"""`quantization_config` of a calibrated checkpoint, as transformers sees it."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from wina_calib.checkpoint.settings import Settings
from wina_calib.model.folder import METHOD


@register_quantization_config(METHOD)
class WinaConfig(QuantizationConfigMixin):
    """`quantization_config` of a calibrated checkpoint; the fields are those of `Settings`."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = METHOD
        values.pop("quant_method", None)
        self.settings = Settings.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object for config.json."""
        return self.settings.to_dict()
