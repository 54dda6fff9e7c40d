"""The NeMo model class: Purified On-Policy Self-Distillation on Megatron-core."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from megatron.core import parallel_state
from nemo.core.classes import ModelPT
from nemo.core.classes.common import PretrainedModelInfo
from nemo.utils import AppState
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.checkpoint.source import checked_base, open_source
from nemo_popsd.config.loading import from_dict_config, to_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.config import SourceConfig
from nemo_popsd.data.contexts import Borrowed
from nemo_popsd.data.dataset import EvaluationPrompt, PromptDataset, PromptRow, build_dataset, build_evaluation_prompts
from nemo_popsd.data.sampler import StepSampler, collate
from nemo_popsd.data.tokenizer import load_tokenizer, read_generation_config, refuse_tokens_beyond, stop_token_ids
from nemo_popsd.diagnosis.record import Diagnosis
from nemo_popsd.diagnosis.run import choose_rows, diagnose
from nemo_popsd.embedded.names import asset
from nemo_popsd.errors import StopRequested, UserError
from nemo_popsd.evaluation.markers import count_markers
from nemo_popsd.evaluation.summary import EvaluationSummary
from nemo_popsd.megatron.config import StudentConfig
from nemo_popsd.megatron.optimizer import StudentOptimizer
from nemo_popsd.megatron.student import LoadWeights, Student
from nemo_popsd.model.checkpoints import RunCheckpoints, resume_optimizer
from nemo_popsd.model.connector import MegatronSaveRestoreConnector
from nemo_popsd.model.engines import build_engine
from nemo_popsd.model.evaluation import HeldOut
from nemo_popsd.parallel.distributed import initialize, on_any_rank
from nemo_popsd.parallel.signals import StopSignals
from nemo_popsd.rollout.engine import SamplingParams
from nemo_popsd.rollout.storage import RolloutStore
from nemo_popsd.training.guard import non_finite
from nemo_popsd.training.rollouts import TrainingRows
from nemo_popsd.training.step import OnPolicyStep

logger = logging.getLogger(__name__)


class PurifiedOPSDModel(ModelPT):
    """Student, frozen base and data of a run, with NeMo's contract: set-up, steps, save and restore.

    Connects the rooms of the package and contains none of them. Every rank holds its part of the model; Megatron owns
    the process groups, so the Lightning trainer runs with one device per process and manual optimisation.

    Attributes:
        settings: the checked configuration.
        architecture: model and tokenizer files.
        tokenizer: the student's.
        student: the live model and its frozen base.
        last_evaluation: what the last validation found, on every rank.
        last_evaluation_step: optimizer steps behind the weights that it looked at.
        stop: whether the run was asked to save and stop.
        checkpoints: saves the run.
        optimizer: of the student, once training has been set up.
        base: source and fingerprint of the weights that training began with, once it has been set up.
        data_fingerprint: of the training rows; empty without any.
    """

    def __init__(
        self,
        cfg: DictConfig,
        trainer: Trainer | None = None,
        *,
        checkpoint: NemoCheckpoint | None = None,
        resume: bool = False,
    ) -> None:
        """Reads and checks the data, then builds the model. Collective over all ranks.

        Args:
            cfg: a `PopsdConfig` tree (see `nemo_popsd.config.loading.to_dict_config`).
            trainer: the trainer that will run it.
            checkpoint: weights to continue from, instead of `student.source` (see `restore_from`).
            resume: take up the run that wrote `checkpoint`: optimizer, schedule and random state too.

        Raises:
            UserError: configuration, data or model do not fit, `checkpoint` is damaged, or was trained from another
                base or, when resuming, on other rows.
        """
        super().__init__(cfg=cfg, trainer=trainer)
        self._save_restore_connector = MegatronSaveRestoreConnector()
        self.automatic_optimization = False
        self.settings: PopsdConfig = from_dict_config(self.cfg)
        initialize(self.settings.parallel, seed=self.settings.seed)
        self.stop = StopSignals()
        # Without it, NeMo would call the connector on rank 0 alone.
        AppState().model_parallel_size = self.settings.parallel.replica_ranks
        self._restored_steps = checkpoint.step if checkpoint else 0
        load_initial: LoadWeights
        if checkpoint is not None:
            load_initial = checked_base(checkpoint, self.settings.student.source)
            self.architecture = checkpoint.architecture
        else:
            source = open_source(self.settings.student.source)
            self.architecture, load_initial = source.architecture, source.load
        self.tokenizer = load_tokenizer(self.architecture.directory, setting="student.source")
        # Read here: a resumed run may outlive the checkpoint that it began from.
        self._generation = read_generation_config(self.architecture.directory)
        refuse_tokens_beyond(self.tokenizer, self._generation, self.architecture.vocab_size)
        self.data_fingerprint = ""
        self._longest = 0
        if self.settings.data.train.path:
            self.setup_training_data(self.settings.data.train)
        if checkpoint is not None and resume:
            _refuse_other_rows(checkpoint, self.data_fingerprint)
        if self.settings.data.validation.path:
            self.setup_validation_data(self.settings.data.validation)
        self.student = Student(
            self.architecture,
            self.settings.student,
            self.settings.parallel,
            seed=self.settings.seed,
            load_initial=load_initial,
            load_trained=checkpoint.load_trained if checkpoint else None,
            base_first=checkpoint is not None and checkpoint.adapters_only,
        )
        self.chunks = torch.nn.ModuleList(self.student.chunks)
        self._checkpoint = checkpoint  # A packed one is unpacked for as long as its tokenizer files are needed.
        self._resumes = resume
        self.engine = build_engine(
            self.settings,
            self.student,
            self.architecture,
            weights_version=lambda: self.completed_steps,
            longest=lambda: self._longest,
            stop_requested=self.stop.while_decoding,
        )
        self.checkpoints = RunCheckpoints(self.settings, resumed=checkpoint if resume else None)
        self.base: dict[str, str] | None = checkpoint.base if checkpoint else None
        self.optimizer: StudentOptimizer | None = None
        self._step: OnPolicyStep | None = None
        self._held_out = HeldOut(self)
        self.last_evaluation: EvaluationSummary | None = None
        self.last_evaluation_step = -1

    @property
    def completed_steps(self) -> int:
        """On-policy steps behind the current weights."""
        updates = self.trainer.global_step if self._trainer is not None else 0
        return self._restored_steps + updates // self.settings.training.updates_per_step

    # Data

    def setup_training_data(self, train_data_config: SourceConfig | DictConfig) -> None:
        """Reads, checks and measures the training rows; each step takes this data-parallel rank's share."""
        source = _source(train_data_config)
        borrowed = Borrowed(self.settings.distillation.target.borrowed)
        size = self.architecture.vocab_size
        dataset, _ = build_dataset(self.settings.data, source, self.tokenizer, borrowed, vocab_size=size)
        self.data_fingerprint = dataset.digest()
        self._refuse_beyond_positions(
            dataset.builder.longest_context + self.settings.rollout.max_response_tokens,
            "data.max_prompt_tokens, data.max_reference_tokens or rollout.max_response_tokens",
        )
        sampler = StepSampler(
            len(dataset),
            prompts_per_step=self.settings.training.prompts_per_step,
            seed=self.settings.seed,
            shuffle=self.settings.data.shuffle,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            start_step=self._restored_steps,
        )
        self._train_dl = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)

    def setup_validation_data(self, val_data_config: SourceConfig | DictConfig) -> None:
        """Reads the held-out rows; data-parallel ranks share them out."""
        prompts, _ = build_evaluation_prompts(
            self.settings.data, _source(val_data_config), self.tokenizer, vocab_size=self.architecture.vocab_size
        )
        prompts = prompts[: self.settings.evaluation.problems]
        self.refuse_long_evaluation(prompts)
        ranks = parallel_state.get_data_parallel_world_size()
        in_step = self.settings.parallel.expert > 1  # ranks that share experts ask as often as each other
        if len(prompts) < ranks or (in_step and len(prompts) % ranks):
            raise UserError(
                "data.validation",
                got=f"{len(prompts)} problems for {ranks} data-parallel ranks",
                need="equally many for each rank under expert parallelism" if in_step else "at least one for each rank",
                fix="set data.validation.path or evaluation.problems",
            )
        mine = prompts[parallel_state.get_data_parallel_rank() :: ranks]
        rows = self.settings.rollout.batch_rows
        self._validation_dl: Any = DataLoader(cast(Any, mine), batch_size=rows, collate_fn=collate)

    def refuse_long_evaluation(self, prompts: Sequence[EvaluationPrompt]) -> None:
        """Refuse problems whose responses could go beyond the model's positions."""
        self._refuse_beyond_positions(
            max(len(prompt.prompt) for prompt in prompts) + self.settings.evaluation.max_response_tokens,
            "evaluation.max_response_tokens",
        )

    def _refuse_beyond_positions(self, longest: int, settings: str) -> None:
        self._longest = max(self._longest, longest)
        limit = getattr(self.architecture.config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise UserError(
                "sequence length",
                got=f"contexts of up to {longest} tokens, response included",
                need=f"at most the model's {limit} positions (max_position_embeddings in its config.json)",
                fix=f"set {settings}",
            )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches are token ids in lists; micro-batches are made on the device."""
        return batch

    # Training

    def configure_optimizers(self) -> StudentOptimizer:
        """Megatron's DDP and optimizer around what is trained."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.chunks.parameters()]
        trained = sum(size for size, trains in sizes if trains)
        logger.info("training %s of %s weights on this rank", f"{trained:,}", f"{sum(size for size, _ in sizes):,}")
        optimizer = StudentOptimizer(
            self.student.wrap(self.settings.optimizer),
            self.settings.optimizer,
            steps=self.settings.training.steps * self.settings.training.updates_per_step,
            bf16=self.settings.student.precision == "bf16",
        )
        if self._checkpoint is not None and self._resumes:
            resume_optimizer(self._checkpoint, self.student.chunks, optimizer)
        fingerprint = self.base["fingerprint"] if self.base else open_source(self.settings.student.source).fingerprint()
        self.base = {"source": self.settings.student.source, "fingerprint": fingerprint}
        loader: Any = self._train_dl
        dataset, sampler = cast(PromptDataset, loader.dataset), cast(StepSampler, loader.batch_sampler)
        self._step = OnPolicyStep(
            self.settings,
            self.student,
            self.engine,
            self.sampling(self.settings.rollout),
            self._count_markers,
            store=(
                RolloutStore(self.settings.output, check_lock=self.checkpoints.check_lock)
                if self.settings.rollout.save
                else None
            ),
            training_rows=TrainingRows(dataset.by_id, lambda step: [dataset[i] for i in sampler.local_batch(step - 1)]),
            stop=self.stop,
        )
        self.optimizer = optimizer
        return optimizer

    def training_step(self, batch: list[PromptRow], batch_idx: int) -> None:
        """One on-policy step; see `nemo_popsd.training.step`."""
        assert self._step is not None
        counted: Any = self.optimizers()
        number = self.completed_steps + 1
        metrics = self._step(number, batch, counted.optimizer, counted.step)
        self.log_dict({"step": float(number), **metrics.as_dict()})

    # Evaluation

    def validation_step(self, batch: list[EvaluationPrompt], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answers held-out problems."""
        if self.stop.requested:
            return
        try:
            self._held_out.answer(batch)
        except StopRequested:
            self.stop.request()

    def on_validation_epoch_end(self, sync_metrics: bool = False) -> None:
        """Scores the answers of all data-parallel ranks and logs their summary.

        Raises:
            StopRequested: on every rank; nothing is scored.
        """
        self.stop.raise_if_requested()
        summary = self._held_out.conclude()
        self.last_evaluation, self.last_evaluation_step = summary, self.completed_steps
        logger.info(
            "step %d: accuracy %.1f %% on %d held-out problems, %.0f tokens per answer, %.1f markers per 1,000",
            self.completed_steps,
            100 * summary.accuracy,
            summary.problems,
            summary.mean_tokens,
            summary.markers_per_1000_tokens,
        )
        metrics = {f"validation/{name}": value for name, value in summary.numbers().items()}
        # Already over all ranks; `sync_dist` says so to Lightning, whose trainer knows one device and reduces nothing.
        self.log_dict({"step": float(self.completed_steps), **metrics}, sync_dist=True)

    # Diagnosis

    def diagnose(self, name: str) -> Diagnosis:
        """The paper's analysis of the current weights on rows of `data.train`, under `name`. Collective."""
        loader: Any = self._train_dl
        return diagnose(
            self.student,
            self.engine,
            self.sampling(self.settings.rollout),
            self.tokenizer,
            choose_rows(loader.dataset, self.settings),
            self.settings,
            name=name,
            step=self.completed_steps,
            stop=self.stop,
        )

    def sampling(self, section: Any) -> SamplingParams:
        """How `rollout` or `evaluation`, whichever `section` is, draws tokens from this model."""
        return SamplingParams(
            temperature=section.temperature,
            top_p=section.top_p,
            top_k=section.top_k,
            max_response_tokens=section.max_response_tokens,
            stop_token_ids=frozenset(stop_token_ids(self.tokenizer, self._generation)),
        )

    def _count_markers(self, response: Sequence[int]) -> int:
        counts = count_markers(self.tokenizer.decode(list(response)), self.settings.evaluation.markers)
        return sum(counts.values())

    # Checkpoints

    @classmethod
    def restore_from(cls, restore_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """NeMo's, from a directory or a `.nemo` file; see `MegatronSaveRestoreConnector`. Collective."""
        if kwargs.get("save_restore_connector") is None:
            kwargs["save_restore_connector"] = MegatronSaveRestoreConnector()
        return super().restore_from(str(restore_path), *args, **kwargs)

    def export_huggingface(self, output: str | Path) -> None:
        """Writes the student as a Hugging Face directory, adapters merged. Collective over all ranks.

        Raises:
            UserError: on all ranks, if a weight is not finite.
        """
        if on_any_rank(non_finite(self.chunks.parameters())):
            raise UserError(
                f"export to {output}",
                got="weights that are NaN or Inf",
                need="finite ones, which any model is made of",
                fix="export an earlier checkpoint",
            )
        self.architecture.export(self.student.chunks, output)

    @classmethod
    def from_pretrained(cls, model_name: str, *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Builds an embedded model by its name, ready to evaluate or export; `override_config_path` may say more.

        NeMo's own method downloads an archive, which these models are not.

        Raises:
            UserError: no embedded model has that name.
        """
        config = PopsdConfig()
        config.student = StudentConfig(source=str(asset(model_name)), precision="fp32", adaptation="full")
        tree = to_dict_config(config)
        if kwargs.get("override_config_path") is not None:
            tree = cast(DictConfig, OmegaConf.merge(tree, kwargs["override_config_path"]))
        return tree if kwargs.get("return_config") else cls(cfg=tree, trainer=trainer)

    @classmethod
    def list_available_models(cls) -> list[PretrainedModelInfo]:
        """The embedded model; others come as local directories."""
        return [
            PretrainedModelInfo(
                pretrained_model_name="nemo_popsd:tiny_reasoner",
                description="A tiny long-chain-of-thought reasoner that ships with the package (Hugging Face format).",
                location="nemo_popsd:tiny_reasoner",
                class_=cls,
            )
        ]


def _refuse_other_rows(checkpoint: NemoCheckpoint, fingerprint: str) -> None:
    if checkpoint.manifest["data"] != fingerprint:
        raise UserError(
            "resuming",
            got="other training rows than those that the run began with",
            need=f"the same rows, wherever they lie (they were in {checkpoint.config.data.train.path!r})",
            fix="set data.train.path, or output for another run, or overwrite=true to begin anew",
        )


def _source(config: SourceConfig | DictConfig) -> SourceConfig:
    if isinstance(config, SourceConfig):
        return config
    source: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SourceConfig), config))
    return source
