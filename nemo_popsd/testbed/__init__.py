"""The recipe of the embedded model and data.

`problems` generates the problems; `tokenizer` and `pretrain` make the model; `contexts` measures it from each context.
Distillation of other models does not use this package.
"""
