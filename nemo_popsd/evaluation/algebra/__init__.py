r"""Whether two final answers are the same, decided by rules of our own: what an answer is made of, and how it compares.

    lexer         text, LaTeX or plain, to tokens
    expressions   tokens to an arithmetic expression, or a refusal: every token is used, none is passed over
    units         words behind a number
    forms         an answer as a whole: a quantity, words, a list, a tuple, an interval, an equation, a matrix
    numeric       value of an expression: a fraction where it is one, else 50 and 100 digits
    sameness      the comparison of two forms

Nothing here runs what a model wrote: no `eval`, sizes of numbers are limited before they are computed, and the
time is bounded by the limits on length and depth. What the grammar does not read is compared as text; only LaTeX
commands that it does not know at all go to math-verify (`nemo_popsd.evaluation.equivalence`).
docs/evaluation.md lists the decisions, such as per cent and units.
"""
