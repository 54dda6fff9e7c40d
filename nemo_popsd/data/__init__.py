"""Rows and prompts: sources, templates, the three distinct contexts of each row, datasets and their order.

Only the tokenizer is used here: no model, no Megatron, no collectives.
"""
