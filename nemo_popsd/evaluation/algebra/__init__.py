r"""Parsing and comparison of final answers.

    lexer         text, LaTeX or plain, to tokens
    expressions   tokens to an arithmetic expression; every token is used, otherwise the answer is refused
    units         words after a number
    quantities    an expression with its unit, currency or per-cent sign
    forms         a complete answer: a quantity, words, a list, a tuple, an interval, an equation, a matrix
    numeric       the value of an expression: a fraction if it is rational, otherwise 50 and 100 digits
    sameness      the comparison of two forms

Model output is never executed: there is no `eval`, sizes of numbers are limited before they are computed, and limits on
length and depth bound the time. Answers that the grammar cannot parse are compared as text; only answers with unknown
LaTeX commands are passed to math-verify (`nemo_popsd.evaluation.equivalence`). docs/evaluation.md lists the decisions,
such as those on per cent and units.
"""
