"""A double of xFormers 0.0.35 in plain torch: what attn-xformers reads and calls of it, by its documented meaning.

The tests put this folder where `import xformers` finds it, where the real one is not installed. Its bias objects mean
what their dense form says; its operators for CUDA answer questions and compute nothing.
"""

__version__ = "0.0.35"
