"""Reading safetensors checkpoints that may be hostile, and writing them as a stream."""

from wina_calib.shards.files import read_json, safe_path
from wina_calib.shards.layout import Specs, TensorInfo
from wina_calib.shards.reader import Shards
from wina_calib.shards.writer import ShardWriter, plan_shards

__all__ = ["ShardWriter", "Shards", "Specs", "TensorInfo", "plan_shards", "read_json", "safe_path"]
