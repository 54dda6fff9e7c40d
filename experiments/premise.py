"""Checks the conditions of a fair test: `python -m experiments.premise`, on the tuning rows, without held-out rows.

1. From the question alone the model's accuracy is 30 to 80 %, so that it can rise and fall.
2. With the reference in its context the accuracy is at least 15 points higher, so that the teacher can teach.
3. The teacher predicts a terse solution far better than the student, so that copying is attractive.
4. ‖Δ_ref‖ / ‖Δ_total‖ > 1 on the student's rollouts: the reference causes most of the teacher's signal.

Whether plain OPSD changes the markers is a result of the runs (`python -m experiments.results`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.plan import CONF, RUNS
from experiments.rows import FILE, tuning_problems
from nemo_popsd.embedded.names import asset
from nemo_popsd.testbed.contexts import report
from nemo_popsd.testbed.problems import Problem, response, terse_thoughts
from nemo_popsd.testbed.templates import CONTEXTS, Context, user_turn

MODEL = asset("nemo_popsd:tiny_reasoner")


@torch.no_grad()
def terse_log_prob(model: Any, tokenizer: Any, problems: list[Problem], context: Context) -> float:
    """Mean log-probability of a token of the terse solutions, in nats."""
    total, tokens = 0.0, 0
    for problem in problems:
        turn = [{"role": "user", "content": user_turn(context, problem.question, problem.reference)}]
        prompt = tokenizer.encode(
            tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True), add_special_tokens=False
        )
        answer = tokenizer.encode(response(terse_thoughts(problem), problem.answer), add_special_tokens=False)
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        log_probs = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
        total, tokens = total + float(log_probs.sum()), tokens + len(answer)
    return total / tokens


def decomposition() -> dict[str, Any]:
    """Summary of `popsd diagnose` of the model on the first tuning rows."""
    output = RUNS / "premise"
    words = [f"output={output}", f"data.train.path={FILE}", "data.validation.path="]
    command = [sys.executable, "-m", "nemo_popsd", "diagnose", str(CONF), *words, "diagnosis.rows=64"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (summary,) = (output / "diagnosis").glob("*/summary.json")
    found: dict[str, Any] = json.loads(summary.read_text())
    return found


def main() -> None:
    """Runs the command."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    problems = tuning_problems()
    rows = [{"question": p.question, "reference": p.reference, "answer": p.answer} for p in problems]
    print("| context | accuracy | markers per answer | tokens per answer | log-probability of a terse token |")
    print("|---|---|---|---|---|")
    for context in CONTEXTS:
        found = report(model, tokenizer, rows, context, temperature=1.0, seed=1)
        terse = terse_log_prob(model, tokenizer, problems[:64], context)
        accuracy = f"{100 * found.accuracy:.1f} ± {100 * found.standard_error:.1f} %"
        print(f"| {context} | {accuracy} | {found.markers:.2f} | {found.length:.1f} | {terse:.3f} |", flush=True)
    for family in sorted({p.family for p in problems}):
        some = [row for row, problem in zip(rows, problems, strict=True) if problem.family == family]
        shares = [report(model, tokenizer, some, context, temperature=1.0, seed=1).accuracy for context in CONTEXTS]
        print(f"{family}: " + ", ".join(f"{c} {100 * share:.0f} %" for c, share in zip(CONTEXTS, shares, strict=True)))
    every = decomposition()["groups"]["all"]
    print(json.dumps({name: every[name] for name in ("norm_ratio", "cosine_reference", "cosine_question")}, indent=1))


if __name__ == "__main__":
    main()
