"""Where the CPU's constants come from."""

from __future__ import annotations

#: What `attn calibrate --out FILE` found on this machine: float32, 24 problems a kernel and direction, of 16 to 4,096
#: tokens, head_dim 16 to 128, every kind of bias that the kernel takes as it is. Half of the estimates lie within
#: 9 % of the time (flex and reference: 14 %), nine tenths within 25 % (43 %).
MEASURED = "AMD EPYC, 1 thread, float32"
