"""The output of `popsd plan`, from its settings."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from nemo_popsd.config.loading import load_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError
from nemo_popsd.planning import report
from nemo_popsd.planning.alternatives import alternatives
from nemo_popsd.planning.config import PlanConfig
from nemo_popsd.planning.evaluation import estimate_evaluation, evaluation_text
from nemo_popsd.planning.plan import Estimate, estimate, fastest, nearest, problems
from nemo_popsd.planning.settings import split_settings
from nemo_popsd.planning.sizes import read_sizes
from nemo_popsd.planning.workload import Case

SHARING = tuple((responses, order) for responses in (1, 4, 8) for order in ("question_first", "reference_first"))
"""Numbers of responses to a prompt and orders of the templates, which `--sharing` compares."""


def plan_text(
    config: str | Path,
    words: Sequence[str],
    *,
    fastest_layout: bool = False,
    explain: bool = False,
    sharing: bool = False,
    simulated: bool = False,
    failures: bool = False,
    evaluation: bool = False,
    as_json: bool = False,
) -> str:
    """The full estimate of one layout, or a table if `nodes` has several values.

    Args:
        config: configuration file of the run.
        words: ``key=value`` settings of the plan and of the run.
        fastest_layout: search for the fastest layout instead of using that of the run.
        explain: add a comparison with neighbouring layouts, see `alternatives`.
        sharing: print a table over `SHARING` instead, for the layout of the run.
        simulated: simulate steps with unequal responses and slow nodes instead.
        failures: print the goodput with failing nodes by interval between saves instead.
        evaluation: estimate the time of one evaluation instead, for the layout of the run.
        as_json: print the same numbers as JSON; a table becomes a list, with null for nodes on which no layout fits.

    Raises:
        UserError: a setting is wrong, `explain` is used with several numbers of nodes, or the only requested layout
            does not divide or fit; `advice` lists the nearest layouts that do.
    """
    plan, rest = split_settings(words)
    run = load_config(config, rest)
    _refuse_means_above_limits(plan, run)
    sizes, origin = read_sizes(run.student.source)
    cases = [Case(run, plan, sizes, nodes) for nodes in plan.nodes]
    if sharing:
        names = "rollout.per_prompt", "data.templates.order"
        varied = [cases[0].replace(dict(zip(names, values, strict=True))) for values in SHARING]
        return report.sharing_table([_estimate_or_raise(case, fastest_layout) for case in varied])
    if simulated or failures:
        _require_simpy()
        from nemo_popsd.planning.simulated_report import failures_text, simulation_text

        found = [_estimate_or_raise(case, fastest_layout) for case in cases]
        return (simulation_text if simulated else failures_text)(found)
    if evaluation:
        return evaluation_text([estimate_evaluation(case) for case in cases], as_json=as_json)
    if len(cases) == 1:
        result = _estimate_or_raise(cases[0], fastest_layout)
        others = alternatives(result.case) if explain else []
        if as_json:
            data = report.as_data(result, origin)
            return json.dumps(
                {**data, "alternatives": report.alternatives_as_data(others)} if explain else data, indent=2
            )
        text = report.describe(result, origin)
        return f"{text}\n\n{report.comparison(result, others)}" if explain else text
    if explain:
        raise UserError(
            "plan",
            got=f"--explain with {len(cases)} numbers of nodes",
            need="one layout to compare with its neighbours",
            fix="set one number, as in nodes=4",
        )
    rows = [(case, _estimate_or_none(case, fastest_layout)) for case in cases]
    if as_json:
        return json.dumps([None if row is None else report.as_data(row, origin) for _, row in rows], indent=2)
    return report.growth_table(rows)


def _require_simpy() -> None:
    if importlib.util.find_spec("simpy") is None:
        raise UserError(
            "plan",
            got="--simulate or --failures without the package simpy",
            need="simpy in this environment",
            fix="pip install 'nemo_popsd[simulate]'",
        )


def _refuse_means_above_limits(plan: PlanConfig, run: PopsdConfig) -> None:
    """Refuses a mean length above the limit of the run, which no row can exceed."""
    for name, limit_name, limit in (
        ("prompt_tokens", "data.max_prompt_tokens", run.data.max_prompt_tokens),
        ("reference_tokens", "data.max_reference_tokens", run.data.max_reference_tokens),
        ("response_tokens", "rollout.max_response_tokens", run.rollout.max_response_tokens),
        ("evaluation_tokens", "evaluation.max_response_tokens", run.evaluation.max_response_tokens),
    ):
        mean = getattr(plan.workload, name)
        if mean is not None and mean > limit:
            raise UserError(
                "plan",
                got=f"workload.{name}={mean} with {limit_name}={limit}",
                need="a mean no higher than the limit",
                fix=f"set workload.{name} or {limit_name}",
            )


def _estimate_or_raise(case: Case, fastest_layout: bool) -> Estimate:
    if fastest_layout:
        best = fastest(case)
        if best is not None:
            return best[1]
        reasons = [f"no layout on {case.layout.world} GPUs"]
    else:
        reasons = problems(case)
        if not reasons:
            return estimate(case)
    raise UserError(
        f"plan of {case.sizes.name} on {case.layout.nodes} x {case.layout.gpus_per_node} GPUs",
        got="; ".join(reasons),
        need="a layout that divides and fits",
        fix="set parallel.*, or nodes",
        advice=report.advice([] if fastest_layout else nearest(case)),
    )


def _estimate_or_none(case: Case, fastest_layout: bool) -> Estimate | None:
    if fastest_layout:
        best = fastest(case)
        return None if best is None else best[1]
    return None if problems(case) else estimate(case)
