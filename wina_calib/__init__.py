"""wina_calib: calibrate once, load a sparse-ready checkpoint anywhere.

Importing it registers the checkpoint format with transformers: `AutoModelForCausalLM.from_pretrained` loads it too.
"""

import os as _os
import sys as _sys
from itertools import pairwise as _pairwise

from wina_calib.version import __version__

# The program imports what a command needs once that is known: help, completion and mistakes do not wait for torch.
_CALLED, *_ = getattr(_sys, "argv", None) or [""]
_AS_MODULE = _CALLED == "-m" and ("-m", "wina_calib") in _pairwise(_sys.orig_argv)
_IS_PROGRAM = _AS_MODULE or _CALLED.rpartition(_os.sep)[2] == "wina-calib"

if not (_IS_PROGRAM or _os.environ.get("_WINA_CALIB_COMPLETE")):
    from wina_calib.calibration.options import CalibrateOptions
    from wina_calib.calibration.run import Result, calibrate
    from wina_calib.checkpoint.hub import push_to_hub
    from wina_calib.errors import WinaError
    from wina_calib.recovery.run import Recovery, recover
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
    "Recovery",
    "Result",
    "WinaError",
    "__version__",
    "calibrate",
    "compare",
    "evaluate",
    "load",
    "push_to_hub",
    "recover",
    "set_prefill",
    "set_sparsity",
]
