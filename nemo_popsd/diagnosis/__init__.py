"""The paper's analysis for any model and data: the decomposition of the teacher's signal at every token.

config.py       settings of a diagnosis
tokens.py       decomposition, divergences and most likely alternatives of tokens; chunked, over vocabulary shards
shards.py       the k largest entries of a sharded vocabulary
push.py         the vocabulary entries that each component promotes and suppresses, summed over tokens
pieces.py       the text of each token, and the tokens of epistemic markers
groups.py       means and quartiles by position and by entropy, for marker tokens and other tokens
record.py       the files summary.json and rollouts.jsonl
run.py          the diagnosis, from student, engine and rows to these files
"""
