"""The embedded default model, its data, and the recipe that reproduces both.

`assets` resolves the names `nemo_popsd:...`; `problems` draws the problems; `tokenizer` and `pretrain` make the model;
`contexts` measures it from each context. Nothing here is needed to distil a model of your own.
"""

from nemo_popsd.testbed.assets import asset

__all__ = ["asset"]
