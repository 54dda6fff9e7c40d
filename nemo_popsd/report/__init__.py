"""Reports on runs: self-contained HTML pages with inline SVG, built with only the standard library and yaml.

run.py            reads the directory of a run
page.py           the report on one or several runs: `popsd report`
verdicts.py       the rules that answer the three questions of the report
sections.py       sections of the report
arms.py           means over the seeds of runs that otherwise have the same settings
groups.py         distinct names for runs; one line for the seeds of an arm
decomposition.py  plots of the paper's decomposition, used by reports and diagnoses
views.py          the scores of views before training: `popsd diagnose --views`
tokens.py         the page of a diagnosis, token by token: `popsd diagnose`
plots.py, bars.py SVG
markup.py         escaping of text and formatting of numbers
shell.py          the HTML document with its style, script and security policy (assets/)
"""

from nemo_popsd.report.arms import text as text_over_seeds
from nemo_popsd.report.page import write_report
from nemo_popsd.report.run import read_run
from nemo_popsd.report.tokens import write_diagnosis_page
from nemo_popsd.report.views import text as views_text
from nemo_popsd.report.views import write_views_page

__all__ = ["read_run", "text_over_seeds", "views_text", "write_diagnosis_page", "write_report", "write_views_page"]
