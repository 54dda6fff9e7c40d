"""The user turns that the embedded model is pre-trained on: short forms of the default templates.

`conf/tiny.yaml` repeats these texts under `data.templates`, since the model understands only the turns that it was
trained on. Both teachers share one body and differ only in `question_block`, which is empty for the reference-only
teacher.
"""

from __future__ import annotations

from typing import Literal

from nemo_popsd.data.config import TemplatesConfig

Context = Literal["question", "question+reference", "reference"]
"""The contexts of the pre-training mixture: the student's, the privileged teacher's, the reference-only teacher's."""

CONTEXTS: tuple[Context, ...] = ("question", "question+reference", "reference")

TEMPLATES = TemplatesConfig(
    student="{question}\nThink step by step and put the answer in \\boxed{}.",
    question_block="{question}\n",
    teacher=(
        "{question_block}Reference: {reference}\n"
        "Derive it in your own words. Think step by step and put the answer in \\boxed{}."
    ),
    without_reference="{question_block}Think step by step and put the answer in \\boxed{}.",
    system=None,
)
"""The embedded model's templates."""


def user_turn(context: Context, question: str, reference: str) -> str:
    """The user turn of one context.

    Args:
        context: which of the three contexts.
        question: problem statement; unused by `reference`.
        reference: reference solution; unused by `question`.
    """
    if context == "question":
        return TEMPLATES.student.replace("{question}", question)
    block = TEMPLATES.question_block.replace("{question}", question) if context == "question+reference" else ""
    return TEMPLATES.teacher.replace("{question_block}", block).replace("{reference}", reference)
