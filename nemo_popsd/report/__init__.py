"""Pages about runs, from what they leave on disk: self-contained HTML with inline SVG. Standard library and yaml only.

run.py            a run as it lies on disk
page.py           the report on one or several runs: `popsd report`
verdicts.py       its three questions, answered by stated rules
sections.py       its sections
decomposition.py  plots of the paper's decomposition, for both pages
tokens.py         the page of a diagnosis, token by token: `popsd diagnose`
plots.py, bars.py SVG
markup.py         escaping and numbers
shell.py          the document, its style, script and security policy (assets/)
"""

from nemo_popsd.report.page import write_report
from nemo_popsd.report.tokens import write_diagnosis_page

__all__ = ["write_diagnosis_page", "write_report"]
