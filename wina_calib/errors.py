"""Named errors. Every message says what was found, what was expected and what to do."""


class WinaError(Exception):
    """Base of every error that wina_calib raises on purpose. The command line turns it into exit code `exit_code`."""

    exit_code = 1


class UsageError(WinaError):
    """An option or argument cannot be used as given."""

    exit_code = 2


class BudgetError(UsageError):
    """A sparsity budget cannot be met, does not parse, or belongs to another model."""


class UnsupportedModel(WinaError):
    """The model holds something that has no sparse site; the message names the module."""


class ModelFolderError(WinaError):
    """A model folder lacks a file or holds one that cannot be used."""


class CheckpointError(WinaError):
    """A safetensors file, its index or a calibrated checkpoint is damaged, hostile or of another version."""


class CorpusError(WinaError):
    """Calibration or evaluation text is missing, too short or cannot be read."""


class TransformError(WinaError):
    """An orthogonal transform is not exact on this model or cannot be fitted."""


class NumericError(WinaError):
    """A weight or an activation is NaN or infinite; the message names the site."""


class OutOfMemoryError(WinaError):
    """Memory ran out; the message names the option to change and its value."""


class OutputError(WinaError):
    """The output folder exists, cannot be written, is locked or ran out of space."""


class StateError(WinaError):
    """The state of a calibration that was stopped is of another one, or damaged."""


class RankError(WinaError):
    """Another process of a calibration that several share has stopped; `told` where that one says why."""

    told = False


class RuntimeLoadError(WinaError):
    """A checkpoint cannot be loaded as a sparse model."""


class HubError(WinaError):
    """A repository on the Hugging Face Hub cannot be read or written."""
