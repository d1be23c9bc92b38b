"""Reading safetensors checkpoints that may be hostile, and writing them as a stream."""

from wina_calib.storage.safe_files import read_json, safe_path
from wina_calib.storage.safetensors_layout import Specs, TensorInfo
from wina_calib.storage.safetensors_reader import Shards
from wina_calib.storage.safetensors_writer import ShardWriter, plan_shards

__all__ = ["ShardWriter", "Shards", "Specs", "TensorInfo", "plan_shards", "read_json", "safe_path"]
