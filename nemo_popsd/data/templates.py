r"""The user turns of the three distinct prompts, by plain replacement of named placeholders.

`{question}`, `{reference}` and `{question_block}` are placeholders; every other brace is literal, so `\boxed{}` needs
no escaping. Replacement is one pass: inserted text is not searched again, so a question that quotes "{reference}" is
not changed.
"""

from __future__ import annotations

import re

from nemo_popsd.data.config import TemplatesConfig
from nemo_popsd.errors import UserError

_PLACEHOLDER = re.compile(r"\{(question|reference|question_block)\}")

# Phrases in the shared teacher body that refer to the problem, which the reference-only teacher does not see.
_NOUN = r"(?:problem|question|exercise)"
_REFERS_TO_PROBLEM = re.compile(
    rf"\b(?:above|preceding|previous|following|given)\s+{_NOUN}\b|\b{_NOUN}\s+(?:above|below|given|stated)\b",
    re.IGNORECASE,
)

# template -> (required placeholders, allowed placeholders)
_RULES: dict[str, tuple[set[str], set[str]]] = {
    "student": ({"question"}, {"question"}),
    "question_block": ({"question"}, {"question"}),
    "teacher": ({"question_block", "reference"}, {"question_block", "reference"}),
    "without_reference": ({"question_block"}, {"question_block"}),
    "system": (set(), set()),
}


def placeholders(template: str) -> list[str]:
    """Return the names of the placeholders in `template`, in order, with repetitions."""
    return _PLACEHOLDER.findall(template)


def fill(template: str, **values: str) -> str:
    """Replace the placeholders of `template` in one pass; `values` must contain every placeholder that occurs."""
    return _PLACEHOLDER.sub(lambda match: values[match.group(1)], template)


def check_templates(templates: TemplatesConfig) -> None:
    """Refuse templates that lack a required placeholder, contain a forbidden one, or refer to an unseen problem.

    Raises:
        UserError: names the template and the placeholder or the phrase.
    """
    for name, (required, allowed) in _RULES.items():
        template: str | None = getattr(templates, name)
        if template is None:
            continue
        present = set(placeholders(template))
        setting = f"data.templates.{name}"
        for missing in sorted(required - present):
            raise UserError(
                "templates",
                got=f"{setting} without {{{missing}}}",
                need=f"the placeholder {{{missing}}}",
                fix=f"set {setting}",
            )
        for forbidden in sorted(present - allowed):
            raise UserError(
                "templates",
                got=f"{setting} with {{{forbidden}}}",
                need=f"only {_braced(allowed)} there",
                fix=f"set {setting}",
            )
    _check_order(templates)
    for name in ("teacher", "without_reference"):
        phrase = _REFERS_TO_PROBLEM.search(_PLACEHOLDER.sub(" ", getattr(templates, name)))
        if phrase is not None:
            raise UserError(
                "templates",
                got=f"data.templates.{name} with the phrase {phrase.group()!r}",
                need="a body that does not refer to the problem, which the reference-only teacher does not see",
                fix="move the phrase into data.templates.question_block",
            )


def _check_order(templates: TemplatesConfig) -> None:
    """Refuse a `teacher` whose first placeholder contradicts `order`."""
    first = placeholders(templates.teacher)[0]
    order = "reference_first" if first == "reference" else "question_first"
    if order != templates.order:
        raise UserError(
            "templates",
            got=f"data.templates.teacher with {{{first}}} first and data.templates.order={templates.order}",
            need="the same order in both",
            fix=f"set data.templates.teacher, or data.templates.order={order}",
        )


def teacher_turn(templates: TemplatesConfig, *, question: str | None, reference: str | None) -> str:
    """Return a teacher's user turn.

    Args:
        templates: templates of the run.
        question: None for the reference-only teacher, whose question block is empty.
        reference: the reference that the teacher sees; None selects the body `without_reference`.
    """
    block = "" if question is None else fill(templates.question_block, question=question)
    if reference is None:
        return fill(templates.without_reference, question_block=block)
    return fill(templates.teacher, question_block=block, reference=reference)


def student_turn(templates: TemplatesConfig, *, question: str) -> str:
    """Return the user turn of the student and of the frozen base."""
    return fill(templates.student, question=question)


def _braced(names: set[str]) -> str:
    return " and ".join(f"{{{name}}}" for name in sorted(names)) or "no placeholder"
