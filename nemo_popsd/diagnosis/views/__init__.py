"""Scores of targets before training: the expected effect of a view of the reference, or of a family, on the student.

tokens.py      measures the tokens of the student's answers under one target, over vocabulary shards
measure.py     measures all answers under all targets, with forwards in every layout
sampling.py    generates the student's answers and stores them on disk
scores.py      computes scores with intervals over problems
verdicts.py    the sentences about each target and about the best one
record.py      the file views.json
"""
