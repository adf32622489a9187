"""Whether the kernels of the double are ops of torch, as those of NATTEN are with a torch that is new enough."""

DISABLE_TORCH_OPS = False
