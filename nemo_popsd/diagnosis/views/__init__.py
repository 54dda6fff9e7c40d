"""Scores of targets before training: what a view of the reference, or another family, would teach the student.

tokens.py      figures of the tokens of the student's answers under one target, over vocabulary shards
measure.py     from answers to the figures of each: forwards in every layout
sampling.py    the student's answers, on disk
scores.py      from figures to scores with intervals, over problems
verdicts.py    the sentence about each target and about the best
record.py      the file views.json
"""
