"""The recipe that makes the embedded model and its problems.

`problems` draws the problems; `tokenizer` and `pretrain` make the model; `contexts` measures it from each context.
Nothing here is needed to distil a model of your own.
"""
