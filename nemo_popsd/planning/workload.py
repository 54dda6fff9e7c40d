"""Sizes of one step: rows of a rank, lengths, micro-batches, branches, decoding batches."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.config.sections import data_settings, shares_prefixes
from nemo_popsd.data.views import Views
from nemo_popsd.distillation.config import DistillationConfig
from nemo_popsd.distillation.target_families import Target, build_target
from nemo_popsd.planning.config import PlanConfig
from nemo_popsd.planning.layout import Layout
from nemo_popsd.planning.packing import Packed, packed
from nemo_popsd.planning.prefixes import FrozenWork
from nemo_popsd.planning.sizes import ModelSizes


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens of one row. The templates of the teachers are not counted."""

    prompt: int
    """P, student prompt."""
    reference: int
    """F, reference text."""
    response: int
    """R, response."""

    @property
    def student(self) -> int:
        """P + R, also the length for the base."""
        return self.prompt + self.response

    @property
    def privileged(self) -> int:
        """P + F + R."""
        return self.prompt + self.reference + self.response

    def of(self, branch: str) -> int:
        """Length of the context of `branch`: base, privileged or reference."""
        return {"base": self.student, "privileged": self.privileged, "reference": self.reference + self.response}[
            branch
        ]


def frozen_branches(config: DistillationConfig) -> tuple[str, ...]:
    """Contexts of the frozen branches that `nemo_popsd.training.branches` runs for a target and its diagnosis.

    A second context with the reference of another row also contains the question, so it counts as privileged.
    """
    branches = build_target(config.target).frozen_branches(diagnosed=config.diagnosed_tokens > 0)
    contexts = {"reference": "privileged"} if config.target.borrowed == "reference" else {}
    return tuple(contexts.get(name, name) for name in branches)


@dataclass(frozen=True)
class Case:
    """One run on one layout: the input of all formulas."""

    config: PopsdConfig
    """The run."""
    plan: PlanConfig
    """Assumptions of the plan."""
    sizes: ModelSizes
    """The model."""
    nodes: int
    """Number of nodes."""
    device: str = "cuda"
    """Type of the device on which the run computes."""

    def replace(self, settings: Mapping[str, object]) -> Case:
        """The same run with other values of dotted settings, such as ``{"parallel.tensor": 2}``, without checks."""
        config = copy.copy(self.config)
        for name, value in settings.items():
            *sections, field = name.split(".")
            owner: object = config
            for section in sections:
                changed = copy.copy(getattr(owner, section))
                setattr(owner, section, changed)
                owner = changed
            setattr(owner, field, value)
        return dataclasses.replace(self, config=config)

    def setting(self, name: str) -> object:
        """Value of a dotted setting of the run."""
        section, _, field = name.rpartition(".")
        return getattr(getattr(self.config, section), field)

    @cached_property
    def layout(self) -> Layout:
        """The layout."""
        return Layout.of(self.config.parallel, nodes=self.nodes, gpus_per_node=self.plan.gpus_per_node)

    @property
    def element(self) -> int:
        """Bytes of a weight or activation."""
        return 2 if self.config.student.precision == "bf16" else 4

    @property
    def lora(self) -> bool:
        """Whether adapters are trained."""
        return self.config.student.adaptation == "lora"

    @property
    def gradient_element(self) -> int:
        """Bytes per element in which gradients are accumulated and reduced."""
        return 2 if self.config.optimizer.grad_dtype == "bf16" else 4

    @property
    def shards_state(self) -> bool:
        """Whether optimizer state is sharded over the ranks that hold the same weights."""
        return self.config.optimizer.sharded(self.layout.dense_replicas)

    @property
    def plain(self) -> bool:
        """Whether layers keep the activations of plain torch: the run sets local layers, or the plan `plain` ones."""
        return self.config.student.layers == "local" or self.plan.workload.layers == "plain"

    @property
    def prompts(self) -> int:
        """Prompts of one step over all ranks."""
        per_node = self.plan.workload.prompts_per_node
        return self.config.training.prompts_per_step if per_node is None else per_node * self.nodes

    @property
    def responses(self) -> int:
        """n, responses per prompt."""
        return self.config.rollout.per_prompt

    @property
    def questions(self) -> int:
        """q, prompts of one data-parallel rank."""
        return self.prompts // self.layout.data

    @property
    def rows(self) -> int:
        """R = q·n, responses of one data-parallel rank."""
        return self.questions * self.responses

    @cached_property
    def limits(self) -> Lengths:
        """The maximum lengths of the run, for which memory is planned."""
        data = self.config.data
        # Without texts both teachers have the view `none`.
        reference = data.max_reference_tokens if Views.of(data_settings(self.config)).texts else 0
        return Lengths(data.max_prompt_tokens, reference, self.config.rollout.max_response_tokens)

    @cached_property
    def means(self) -> Lengths:
        """The mean lengths, for which time and work are estimated."""
        work, limits = self.plan.workload, self.limits
        return Lengths(
            work.prompt_tokens or limits.prompt,
            limits.reference and (work.reference_tokens or limits.reference),
            work.response_tokens or limits.response,
        )

    @cached_property
    def target(self) -> Target:
        """The target distribution, which determines the numbers of vectors and branches."""
        return build_target(self.config.distillation.target)

    @cached_property
    def branches(self) -> tuple[str, ...]:
        """Frozen branches."""
        return frozen_branches(self.config.distillation)

    @property
    def updates(self) -> int:
        """u, optimizer updates per step, each on an equal part of the rows."""
        return self.config.training.updates_per_step

    @property
    def microbatch_rows(self) -> int:
        """Maximum number of responses in one student micro-batch."""
        fitting = max(1, self.config.training.microbatch_tokens // self.limits.student)
        return min(fitting, math.ceil(self.rows / self.updates))

    @property
    def microbatch_tokens(self) -> int:
        """Maximum number of padded tokens in one student micro-batch."""
        return self.microbatch_rows * self.limits.student

    @property
    def microbatch_responses(self) -> int:
        """Maximum number of response tokens of one student micro-batch whose loss one rank computes."""
        return math.ceil(self.microbatch_rows * self.limits.response / self.layout.context)

    @property
    def owned_rows(self) -> float:
        """r/c, number of rows whose loss a rank computes: context-parallel ranks divide the response tokens."""
        return self.rows / self.layout.context

    @property
    def microbatches(self) -> int:
        """m, student micro-batches per rank and update, at the mean lengths."""
        return math.ceil(
            self.rows / self.updates / max(1, self.config.training.microbatch_tokens // self.means.student)
        )

    def frozen_batches(self, lengths: Lengths) -> list[Packed]:
        """Packed micro-batches of the frozen forwards, each sequence separate, if all rows have `lengths`."""
        contexts = [(lengths.of(branch), lengths.response) for branch in self.branches for _ in range(self.rows)]
        return packed(contexts, self.config.training.frozen_tokens, self.layout)

    def student_batches(self, lengths: Lengths) -> list[Packed]:
        """Packed micro-batches of the student in one update, if all rows have `lengths`."""
        rows = math.ceil(self.rows / self.updates)
        own = [(lengths.student, lengths.response)] * rows
        return packed(own, self.config.training.microbatch_tokens, self.layout)

    @property
    def shares_prefixes(self) -> bool:
        """Whether the frozen branches compute each distinct prefix once; see `why_not_shared` in
        `nemo_popsd.megatron.prefix.forward` for the layouts.
        """
        return shares_prefixes(self.config) and self.layout.context == self.layout.expert == 1

    def frozen_work(self, lengths: Lengths, *, shared: bool | None = None) -> FrozenWork:
        """Work of the frozen branches for one question; `shared` defaults to whether the run shares prefixes."""
        if not (self.shares_prefixes if shared is None else shared):
            return FrozenWork.separate([lengths.of(branch) for branch in self.branches], self.responses)
        question, reference = ("question", lengths.prompt), ("reference", lengths.reference)
        both = [question, reference]
        if self.config.data.templates.order == "reference_first":
            both.reverse()
        contexts = []
        for number, branch in enumerate(self.branches):
            parts = {"base": [question], "privileged": both, "reference": [reference]}[branch]
            if branch in self.branches[:number]:  # with another row's reference
                parts = [part if part == question else ("other reference", lengths.reference) for part in parts]
            contexts.append(parts)
        return FrozenWork.shared(contexts, lengths.response, self.responses)

    @property
    def frozen_tokens(self) -> int:
        """Maximum number of padded tokens in one frozen forward."""
        if self.config.training.packing and not self.shares_prefixes:
            return max(batch.tokens for batch in self.frozen_batches(self.limits))
        work = self.frozen_work(self.limits)
        return min(max(self.config.training.frozen_tokens, work.longest), self.questions * work.tokens)

    @property
    def kept_positions(self) -> int:
        """Maximum number of positions whose keys and values are kept from one frozen forward to the next."""
        work = self.frozen_work(self.limits)
        if self.questions * work.tokens <= self.config.training.frozen_tokens:
            return 0
        return min(work.kept, self.config.training.frozen_cache_tokens)

    @property
    def frozen_forwards(self) -> int:
        """Frozen forwards per rank and step, at the mean lengths."""
        tokens = self.questions * self.frozen_work(self.means).tokens
        return math.ceil(tokens / self.config.training.frozen_tokens)

    @property
    def generated_rows(self) -> int:
        """Number of responses that a rank generates. Context-parallel ranks divide the rows; replicas that share
        experts generate the rows of all of them.
        """
        if self.layout.expert > 1:
            return self.rows * self.layout.sharing_replicas
        return math.ceil(self.rows / self.layout.context)

    @property
    def prefilled_rows(self) -> int:
        """Number of prompts that a rank prefills: each once for all responses to it that the rank generates."""
        if self.layout.expert > 1:
            return self.questions * self.layout.sharing_replicas
        return min(self.questions, self.generated_rows)

    @property
    def decoded_rows(self) -> int:
        """B, rows that a rank decodes together."""
        rollout = self.config.rollout
        return max(1, min(rollout.batch_rows, self.generated_rows, rollout.cache_tokens // self.limits.student))

    @property
    def decoding_waves(self) -> int:
        """Number of batches of `decoded_rows` that run one after the other."""
        return math.ceil(self.generated_rows / self.decoded_rows)
