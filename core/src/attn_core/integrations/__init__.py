"""Integrations: one host library per file. None is imported by the core; import the one that you use.

from attn_core.integrations import transformers
transformers.enable()
"""
