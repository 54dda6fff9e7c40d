"""The paper's analysis on any model and data: the parts of the teacher's signal at every token.

config.py       settings of a diagnosis
tokens.py       one set of tokens: decomposition, divergences, most likely alternatives; chunked, over vocabulary shards
shards.py       the k largest entries of a sharded vocabulary
push.py         which vocabulary entries each component raises and lowers, summed over tokens
pieces.py       the text of each token; which tokens belong to an epistemic marker
groups.py       means and quartiles by position, by entropy, for marker tokens and others
record.py       the files: summary.json and rollouts.jsonl
run.py          from a student, an engine and rows to those files
"""
