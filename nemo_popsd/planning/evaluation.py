"""The time of one evaluation on a layout: an estimate, not a measurement. Formulas: docs/planning.md, "Evaluation"."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from nemo_popsd.data.named_sets import NAMED_SETS
from nemo_popsd.errors import UserError
from nemo_popsd.planning import traffic
from nemo_popsd.planning.duration import rollout
from nemo_popsd.planning.layout import misfits
from nemo_popsd.planning.served import served_cache_tokens
from nemo_popsd.planning.workload import Case


@dataclass(frozen=True)
class EvaluationEstimate:
    """The estimated time of one evaluation of one model."""

    nodes: int
    """Number of nodes."""
    gpus: int
    """Number of GPUs on all nodes."""
    replicas: int
    """Data-parallel replicas, which divide the responses."""
    problems: int
    """Number of problems in all sets."""
    samples: int
    """Responses per problem."""
    tokens: int
    """Mean tokens of a response."""
    together: int
    """Responses that a rank generates at a time."""
    seconds: float
    """Seconds for prefill and decoding of all responses."""

    @property
    def tokens_per_second(self) -> float:
        """Response tokens per second of all GPUs."""
        return self.problems * self.samples * self.tokens / self.seconds


def estimate_evaluation(case: Case) -> EvaluationEstimate:
    """The time of one evaluation with the settings of a run.

    Raises:
        UserError: the layout does not divide, the number of problems is not known, or a server has no memory for one
            response.
    """
    settings = case.config.evaluation
    if reasons := misfits(case.layout, case.sizes, case.prompts):
        raise UserError("plan", got="; ".join(reasons), need="a layout that divides", fix="set parallel.*, or nodes")
    problems = _problems(case)
    replicas = case.layout.data
    # Each replica evaluates its part of the prompts, one response to a prompt.
    workload = replace(
        case.plan.workload, response_tokens=case.plan.workload.evaluation_tokens or settings.max_response_tokens
    )
    generated = replace(case, plan=replace(case.plan, workload=workload)).replace(
        {
            "training.prompts_per_step": math.ceil(problems * settings.samples_per_problem / replicas) * replicas,
            "rollout.per_prompt": 1,
            "rollout.max_response_tokens": settings.max_response_tokens,
        }
    )
    if case.config.rollout.engine == "vllm":
        # A server starts a response as soon as another one ends, and holds pages for existing tokens only.
        held, cache = generated.means.prompt + generated.means.response / 2, served_cache_tokens(case)
        together = min(generated.generated_rows, int(cache // held))
        if together < 1:
            raise UserError(
                "plan",
                got=f"a cache of {max(0, cache):,.0f} tokens on a server, after its weights",
                need=f"at least {held:,.0f}, the tokens of a prompt with half a response",
                fix="raise rollout.vllm.memory_share or rollout.vllm.tensor",
            )
        batches = generated.generated_rows / together
    else:
        together, batches = generated.decoded_rows, float(generated.decoding_waves)
    batched = generated.replace(
        {"rollout.batch_rows": together, "rollout.cache_tokens": together * generated.limits.student}
    )
    seconds = rollout(batched, traffic.step(batched, from_host=0)).total * batches / batched.decoding_waves
    return EvaluationEstimate(
        nodes=case.nodes,
        gpus=case.layout.world,
        replicas=replicas,
        problems=problems,
        samples=settings.samples_per_problem,
        tokens=generated.means.response,
        together=together,
        seconds=seconds,
    )


def evaluation_text(estimates: Sequence[EvaluationEstimate], *, as_json: bool = False) -> str:
    """A Markdown table with a row for each estimate, or JSON: one object, or a list of several."""
    if as_json:
        data = [{**asdict(one), "tokens_per_second": one.tokens_per_second} for one in estimates]
        return json.dumps(data[0] if len(data) == 1 else data, indent=2)
    head = ["nodes", "GPUs", "problems", "responses", "mean tokens", "at a time", "tokens/s", "hours", "GPU hours"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in estimates:
        hours = one.seconds / 3600
        cells = [f"{one.nodes}", f"{one.gpus}", f"{one.problems:,}", f"{one.problems * one.samples:,}"]
        cells += [f"{one.tokens:,}", f"{one.replicas} · {one.together:,}", f"{one.tokens_per_second:,.0f}"]
        lines.append("| " + " | ".join([*cells, f"{hours:.2f}", f"{hours * one.gpus:.1f}"]) + " |")
    return "\n".join(lines)


def _problems(case: Case) -> int:
    """Number of problems in all sets.

    Raises:
        UserError: a set is a file, whose rows the plan does not count.
    """
    given, settings = case.plan.workload.evaluation_problems, case.config.evaluation
    if given is not None:
        return given
    known = [NAMED_SETS[name].problems for name, path in settings.sets.items() if not path]
    if settings.problems is not None:
        known = [min(count, settings.problems) for count in known]
        known += [settings.problems] * (max(1, len(settings.sets)) - len(known))
    if not known or len(known) < len(settings.sets):
        raise UserError(
            "plan",
            got="an evaluation set that is a file, whose rows the plan does not count",
            need="the number of problems",
            fix="set workload.evaluation_problems",
        )
    return sum(known)
