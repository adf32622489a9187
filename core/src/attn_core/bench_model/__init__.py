"""How fast, how large and how right a whole model is under each kernel; `attn bench-model` prints it.

built = BuiltModel(name="mine", host="timm", model=model, inputs={"x": images})
print(bench_model(built, kernels=("torch/*",)).to_dict())
"""

from .bench import bench_model
from .built import BuiltModel
from .results import Difference, Measured, Row

__all__ = ["BuiltModel", "Difference", "Measured", "Row", "bench_model"]
