"""Where FlashAttention-3's compiled extension lies. Importing it would register ops; here it says that it is there."""  # noqa: N999
