"""The rows of a run on this rank: training data with its sampler, and the problems of `data.validation`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.core import parallel_state
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.config.sections import data_settings
from nemo_popsd.data.config import SourceConfig
from nemo_popsd.data.contexts import Borrowed
from nemo_popsd.data.dataset import EvaluationPrompt, PromptDataset, PromptRow, build_dataset, build_evaluation_prompts
from nemo_popsd.data.report import DataReport
from nemo_popsd.data.sampler import StepSampler, collate
from nemo_popsd.errors import UserError
from nemo_popsd.training.rollouts import TrainingRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingData:
    """The rows that are trained on, and the order in which steps visit them."""

    dataset: PromptDataset
    """All rows; the same on every rank."""
    sampler: StepSampler
    """Indices of this data-parallel rank's rows, step by step."""
    report: DataReport
    """Numbers of rows that were kept, truncated and dropped."""

    def loader(self) -> DataLoader[PromptRow]:
        """One batch per step: the rows of this data-parallel rank."""
        return DataLoader(self.dataset, batch_sampler=self.sampler, collate_fn=collate)

    def rows(self) -> TrainingRows:
        """Access to rows by id and by step."""
        return TrainingRows(
            self.dataset.by_id, lambda step: [self.dataset[index] for index in self.sampler.local_batch(step - 1)]
        )


def read_training_data(
    config: PopsdConfig,
    source: SourceConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    completed_steps: int,
) -> TrainingData:
    """Read and check the rows of `source`, and determine their lengths.

    Args:
        config: configuration of the run.
        source: usually `data.train`.
        tokenizer: the student's tokenizer.
        vocab_size: the student's vocabulary size.
        completed_steps: number of trained steps; the loader starts after them.

    Raises:
        UserError: see `build_dataset`.
    """
    borrowed = Borrowed(config.distillation.target.borrowed)
    dataset, report = build_dataset(
        data_settings(config),
        source,
        tokenizer,
        borrowed,
        vocab_size=vocab_size,
        need_answer=config.distillation.tokens.by_answer,
    )
    sampler = StepSampler(
        len(dataset),
        prompts_per_step=config.training.prompts_per_step,
        seed=config.seed,
        shuffle=config.data.shuffle,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        start_step=completed_steps,
    )
    return TrainingData(dataset, sampler, report)


def read_validation_prompts(
    config: PopsdConfig, source: SourceConfig, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int
) -> list[EvaluationPrompt]:
    """Read the problems of `source`, at most `evaluation.problems`; equal on all ranks.

    Raises:
        UserError: there are too few problems for the data-parallel ranks; see also `build_evaluation_prompts`.
    """
    prompts, _ = build_evaluation_prompts(config.data, source, tokenizer, vocab_size=vocab_size)
    prompts = prompts[: config.evaluation.problems]
    ranks = parallel_state.get_data_parallel_world_size()
    equally = config.parallel.expert > 1  # ranks that share experts must generate the same number of times
    if len(prompts) < ranks or (equally and len(prompts) % ranks):
        raise UserError(
            "data.validation",
            got=f"{len(prompts)} problems for {ranks} data-parallel ranks",
            need="equally many for each rank under expert parallelism" if equally else "at least one for each rank",
            fix="set data.validation.path or evaluation.problems",
        )
    return prompts


def validation_loader(prompts: Sequence[EvaluationPrompt], batch_rows: int) -> DataLoader[EvaluationPrompt]:
    """Load this data-parallel rank's share of `prompts`, in batches of at most `batch_rows`."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    own: Any = prompts[rank::ranks]
    return DataLoader(own, batch_size=batch_rows, collate_fn=collate)


def as_source(config: SourceConfig | DictConfig) -> SourceConfig:
    """Convert `config` to a `SourceConfig`; NeMo's set-up methods pass a tree."""
    if isinstance(config, SourceConfig):
        return config
    source = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SourceConfig), config))
    assert isinstance(source, SourceConfig)
    return source


def refuse_other_rows(checkpoint: NemoCheckpoint, digest: str) -> None:
    """Refuse to resume with rows that differ from those of the run that wrote `checkpoint`.

    Raises:
        UserError: `digest` differs from the digest in the checkpoint.
    """
    if checkpoint.manifest["data"] != digest:
        raise UserError(
            "resuming",
            got="training rows that differ from those that the run started with",
            need=f"the same rows, at any path (they were in {checkpoint.config.data.train.path!r})",
            fix="set data.train.path, or output for another run, or overwrite=true to start again at step 1",
        )
