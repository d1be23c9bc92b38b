"""wina_calib: calibrate once, load a sparse-ready checkpoint anywhere.

Importing it registers the checkpoint format with transformers: `AutoModelForCausalLM.from_pretrained` loads it too.
"""

__version__ = "0.1.0"

import os as _os
import sys as _sys
from pathlib import Path as _Path

# Who asks for the version, the list of commands or a completion does not wait for torch.
_PROGRAM, *_ARGUMENTS = getattr(_sys, "argv", None) or [""]
_ASKS_LITTLE = _Path(_PROGRAM).name == "wina-calib" and _ARGUMENTS in ([], ["--version"], ["--help"], ["-h"])

if not (_ASKS_LITTLE or _os.environ.get("_WINA_CALIB_COMPLETE")):
    from wina_calib.calibration.options import CalibrateOptions
    from wina_calib.calibration.run import Result, calibrate
    from wina_calib.checkpoint.hub import push_to_hub
    from wina_calib.errors import WinaError
    from wina_calib.runtime import model_types as _types
    from wina_calib.runtime import quantizer as _quantizer
    from wina_calib.runtime.load import load, set_prefill, set_sparsity
    from wina_calib.studies.compare.run import compare
    from wina_calib.studies.compare.table import Comparison
    from wina_calib.studies.evaluate import Evaluation, evaluate

    _REGISTERED = (_quantizer, _types)  # both make transformers know the format as they are imported

__all__ = [
    "CalibrateOptions",
    "Comparison",
    "Evaluation",
    "Result",
    "WinaError",
    "__version__",
    "calibrate",
    "compare",
    "evaluate",
    "load",
    "push_to_hub",
    "set_prefill",
    "set_sparsity",
]
