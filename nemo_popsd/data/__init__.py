"""Rows and prompts: sources, templates, the three distinct contexts of each row, datasets and samplers.

This package uses the tokenizer, but no model, no Megatron and no collectives.
"""
