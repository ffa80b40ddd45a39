"""Compress large language models the Minitron way: prune by activation importance, recover by distillation."""

__version__ = "0.1.0"
