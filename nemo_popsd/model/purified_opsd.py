"""The NeMo model class: Purified On-Policy Self-Distillation on Megatron-core."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, Trainer
from nemo.core.classes import ModelPT
from nemo.core.classes.common import PretrainedModelInfo
from nemo.utils import AppState
from omegaconf import DictConfig, OmegaConf

from nemo_popsd.checkpoint.finite import non_finite_error
from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.checkpoint.save import Content
from nemo_popsd.checkpoint.source import checked_base, open_source
from nemo_popsd.config.loading import from_dict_config, to_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.config.sections import diagnosis_settings
from nemo_popsd.data.config import SourceConfig
from nemo_popsd.data.dataset import EvaluationPrompt, PromptRow
from nemo_popsd.data.limits import refuse_beyond_positions
from nemo_popsd.data.tokenizer import load_tokenizer, read_generation_config, refuse_tokens_beyond, stop_token_ids
from nemo_popsd.diagnosis.record import Diagnosis
from nemo_popsd.diagnosis.run import choose_rows, diagnose
from nemo_popsd.embedded.names import asset
from nemo_popsd.errors import StopRequested
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.evaluation.summary import EvaluationSummary
from nemo_popsd.megatron.config import StudentConfig
from nemo_popsd.megatron.limits import refuse_optimizer
from nemo_popsd.megatron.optimizer import StudentOptimizer
from nemo_popsd.megatron.student import LoadWeights, Student
from nemo_popsd.model.callbacks import StepBoundary
from nemo_popsd.model.checkpoints import RunCheckpoints, resume_optimizer
from nemo_popsd.model.connector import MegatronSaveRestoreConnector
from nemo_popsd.model.data import (
    TrainingData,
    as_source,
    read_training_data,
    read_validation_prompts,
    refuse_other_rows,
    validation_loader,
)
from nemo_popsd.model.drift import DriftGuard
from nemo_popsd.model.engines import build_engine
from nemo_popsd.model.evaluation import Sampler, Validation
from nemo_popsd.model.new_run import start_run
from nemo_popsd.model.training import RunStep, build_step
from nemo_popsd.parallel.distributed import initialize, on_any_rank
from nemo_popsd.parallel.heartbeats import Heartbeats
from nemo_popsd.parallel.signals import StopSignals
from nemo_popsd.rollout.config import RolloutConfig
from nemo_popsd.rollout.engine import SamplingParams
from nemo_popsd.training.guard import non_finite

logger = logging.getLogger(__name__)


class PurifiedOPSDModel(ModelPT):  # type: ignore[misc]  # NeMo has no types
    """Student, frozen base and data of a run, with NeMo's contract: set-up, steps, save and restore.

    Connects the packages and implements no algorithm itself. Every rank holds its part of the model; Megatron owns
    the process groups, so the Lightning trainer runs with one device per process and manual optimisation.

    Attributes:
        settings: the checked configuration.
        architecture: model and tokenizer files.
        tokenizer: the student's tokenizer.
        student: the live model and its frozen base.
        engine: generates responses from the live weights.
        sampler: generates samples for an evaluation.
        training_data: rows and sampler of `data.train`; None without training rows.
        last_evaluation: result of the last validation, on every rank.
        stop: requests to save and stop.
        checkpoints: saves the run.
        optimizer: the student's optimizer, after training has been set up.
        base: source and digest of the initial weights, after training has been set up.
        data_digest: identifies the training rows; empty without training rows.
    """

    def __init__(
        self,
        cfg: DictConfig,
        trainer: Trainer | None = None,
        *,
        checkpoint: NemoCheckpoint | None = None,
        resume: bool = False,
    ) -> None:
        """Read and check the data, then build the model. Collective over all ranks.

        Args:
            cfg: a `PopsdConfig` tree (see `nemo_popsd.config.loading.to_dict_config`).
            trainer: the trainer that will run the model.
            checkpoint: weights to continue from, instead of `student.source` (see `restore_from`).
            resume: continue the run that wrote `checkpoint`, with its optimizer, schedule and random state.

        Raises:
            UserError: configuration, data or model do not fit, or `checkpoint` is damaged or was trained from another
                base or, when resuming, on other rows.
        """
        super().__init__(cfg=cfg, trainer=trainer)
        self._save_restore_connector = MegatronSaveRestoreConnector()
        self.automatic_optimization = False
        self.settings: PopsdConfig = from_dict_config(self.cfg)
        initialize(self.settings.parallel, seed=self.settings.seed)
        self.stop = StopSignals(Heartbeats().send)
        AppState().model_parallel_size = self.settings.parallel.replica_ranks  # else the connector runs on rank 0 only
        self._restored_steps = checkpoint.step if checkpoint else 0
        load_initial: LoadWeights
        if checkpoint is not None:
            load_initial = checked_base(checkpoint, self.settings.student.source)
            self.architecture = checkpoint.architecture
        else:
            source = open_source(self.settings.student.source)
            self.architecture, load_initial = source.architecture, source.load
        self.tokenizer = load_tokenizer(self.architecture.directory, setting="student.source")
        # Read now, because a resumed run may remove the checkpoint from which it starts.
        self._generation = read_generation_config(self.architecture.directory)
        refuse_tokens_beyond(self.tokenizer, self._generation, self.architecture.vocab_size)
        self.data_digest, self._longest = "", 0
        self.training_data: TrainingData | None = None
        if self.settings.data.train.path:
            self.setup_training_data(self.settings.data.train)
        if checkpoint is not None and resume:
            refuse_other_rows(checkpoint, self.data_digest)
        if self.settings.data.validation.path:
            self.setup_validation_data(self.settings.data.validation)
        refuse_optimizer(self.settings.optimizer)
        self.student = Student(
            self.architecture,
            self.settings.student,
            self.settings.parallel,
            seed=self.settings.seed,
            load_initial=load_initial,
            load_trained=checkpoint.load_trained if checkpoint else None,
            base_first=checkpoint is not None and checkpoint.adapters_only,
            megatron=self.settings.megatron,
            fp8=self.settings.fp8,
        )
        self.chunks = torch.nn.ModuleList(cast(list[torch.nn.Module], self.student.chunks))
        # The reference keeps the temporary directory of a packed checkpoint, whose tokenizer files are needed.
        self._checkpoint, self._resumes = checkpoint, resume
        self.engine = build_engine(
            self.settings,
            self.student,
            self.architecture,
            weights_version=lambda: self.completed_steps,
            longest=lambda: self._longest,
            stop_requested=self.stop.while_decoding,
        )
        self._drift = DriftGuard(self.settings.guard.drift, self.settings.output)
        self.checkpoints = RunCheckpoints(
            self.settings.training,
            self.settings.output,
            content=self.training_content,
            completed_steps=lambda: self.completed_steps,
            stop=self.stop,
            resumed=checkpoint if resume else None,
            changes=self._drift.changes,
        )
        self.base: dict[str, str] | None = checkpoint.base if checkpoint else None
        self.optimizer: StudentOptimizer | None = None
        self._step: RunStep | None = None
        sampling = self.sampling(self.settings.evaluation)
        self.sampler = Sampler.of(self.settings, self.student, self.engine, sampling, self.tokenizer)
        self._validation = Validation(
            self.sampler, self.settings.output, check_lock=lambda: self.checkpoints.check_lock()
        )
        self.last_evaluation: EvaluationSummary | None = None

    @property
    def completed_steps(self) -> int:
        """Number of completed training steps."""
        updates = self.trainer.global_step if self._trainer is not None else 0
        return self._restored_steps + updates // self.settings.training.updates_per_step

    # Data

    def setup_training_data(self, train_data_config: SourceConfig | DictConfig) -> None:
        """Read and check the training rows, and set up the loader of this data-parallel rank's rows."""
        self.training_data = read_training_data(
            self.settings,
            as_source(train_data_config),
            self.tokenizer,
            vocab_size=self.architecture.vocab_size,
            completed_steps=self._restored_steps,
        )
        self.data_digest = self.training_data.dataset.data_digest()
        self._refuse_beyond_positions(
            self.training_data.dataset.builder.longest_context + self.settings.rollout.max_response_tokens,
            "data.max_prompt_tokens, data.max_reference_tokens or rollout.max_response_tokens",
        )
        self._train_dl = self.training_data.loader()

    def setup_validation_data(self, val_data_config: SourceConfig | DictConfig) -> None:
        """Read the validation problems and split them over data-parallel ranks."""
        prompts = read_validation_prompts(
            self.settings, as_source(val_data_config), self.tokenizer, vocab_size=self.architecture.vocab_size
        )
        self.refuse_long_evaluation(prompts)
        self._validation_dl: Any = validation_loader(prompts, self.settings.rollout.batch_rows)

    def refuse_long_evaluation(self, prompts: Sequence[EvaluationPrompt]) -> None:
        """Refuse problems whose responses could exceed the model's positions, and pass their length to the engine."""
        self._refuse_beyond_positions(
            max(len(prompt.prompt) for prompt in prompts) + self.settings.evaluation.max_response_tokens,
            "evaluation.max_response_tokens",
        )

    def _refuse_beyond_positions(self, longest: int, settings: str) -> None:
        self._longest = max(self._longest, longest)
        refuse_beyond_positions(getattr(self.architecture.config, "max_position_embeddings", None), longest, settings)

    def transfer_batch_to_device(self, batch: object, device: torch.device, dataloader_idx: int) -> object:
        """Return `batch` unchanged: it contains lists of token ids, and micro-batches are built on the device."""
        return batch

    # Training

    def configure_optimizers(self) -> StudentOptimizer:
        """Wrap the trained parameters in Megatron's DDP and optimizer."""
        total = sum(parameter.numel() for parameter in self.chunks.parameters())
        trained = sum(parameter.numel() for parameter in self.chunks.parameters() if parameter.requires_grad)
        logger.info("training %s of %s weights on this rank", f"{trained:,}", f"{total:,}")
        optimizer = StudentOptimizer(
            self.student.wrap(self.settings.optimizer),
            self.settings.optimizer,
            steps=self.settings.training.steps * self.settings.training.updates_per_step,
            bf16=self.settings.student.precision == "bf16",
            fields=self.settings.megatron.values("optimizer"),
        )
        digest = self.base["fingerprint"] if self.base else open_source(self.settings.student.source).weights_digest()
        self.base = {"source": self.settings.student.source, "fingerprint": digest}
        assert self.training_data is not None
        self._step = build_step(
            self.settings,
            self.student,
            self.engine,
            self.sampling(self.settings.rollout),
            self.tokenizer,
            self.training_data,
            check_lock=self.checkpoints.check_lock,
            stop=self.stop,
        )
        if self._checkpoint is not None and self._resumes:
            resume_optimizer(self._checkpoint, self.student.chunks, optimizer, self._step.weights.state)
        self.optimizer = optimizer
        return optimizer

    def training_step(self, batch: list[PromptRow], batch_idx: int) -> None:
        """Run one on-policy step; see `nemo_popsd.training.step`."""
        assert self._step is not None
        wrapped: Any = self.optimizers()  # Lightning's wrapper, whose step() advances trainer.global_step
        step = self.completed_steps + 1
        metrics = self._step(step, batch, wrapped.optimizer, wrapped.step).as_dict()
        self.log_dict({"step": float(step), **metrics})
        self._drift(step, metrics, self.loggers)

    def configure_callbacks(self) -> list[Callback]:
        """Return the callbacks for alarms, checkpoints and signals; Lightning adds them to those of the trainer."""
        return [self._drift, StepBoundary(self.checkpoints, self.stop)]

    # Evaluation

    def validation_step(self, batch: list[EvaluationPrompt], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Generate responses to validation problems."""
        if self.stop.requested:
            return
        try:
            self._validation.answer(batch)
        except StopRequested:
            self.stop.request()

    def on_validation_epoch_end(self, sync_metrics: bool = False) -> None:
        """Score the responses of all data-parallel ranks and log their summary.

        Raises:
            StopRequested: a stop was requested; on every rank, and nothing is scored.
        """
        self.stop.raise_if_requested()
        summary = self._validation.conclude(self.completed_steps)
        self.last_evaluation = summary
        metrics = {f"validation/{name}": value for name, value in summary.numbers().items()}
        # Values are already reduced. `sync_dist` only silences Lightning, which sees one device and reduces nothing.
        self.log_dict({"step": float(self.completed_steps), **metrics}, sync_dist=True)
        self._drift(self.completed_steps, metrics, self.loggers)

    # Diagnosis

    def diagnose(self, name: str) -> Diagnosis:
        """Run the paper's analysis of the current weights on rows of `data.train`, recorded as `name`. Collective."""
        assert self.training_data is not None
        settings = diagnosis_settings(self.settings)
        return diagnose(
            self.student,
            self.engine,
            self.sampling(self.settings.rollout),
            self.tokenizer,
            choose_rows(self.training_data.dataset, settings.diagnosis),
            settings,
            name=name,
            step=self.completed_steps,
            stop=self.stop,
        )

    def sampling(self, section: RolloutConfig | EvaluationConfig) -> SamplingParams:
        """Return the sampling parameters of this model with the settings of `section`."""
        return SamplingParams(
            temperature=section.temperature,
            top_p=section.top_p,
            top_k=section.top_k,
            max_response_tokens=section.max_response_tokens,
            stop_token_ids=frozenset(stop_token_ids(self.tokenizer, self._generation)),
        )

    # Checkpoints

    def content(self) -> Content:
        """Return all weights and the configuration, without training state."""
        return Content(
            models=self.student.chunks,
            architecture=self.architecture,
            config=to_dict_config(self.settings),
            step=self.completed_steps,
            base=self.base,
        )

    def training_content(self) -> Content:
        """Return the content of a run's checkpoint without the random state; with LoRA, only the adapters."""
        assert self.optimizer is not None
        assert self._step is not None
        return replace(
            self.content(),
            adapters_only=self.student.adapters is not None,
            optimizer=self.optimizer.megatron,
            copies=self._step.weights.state,
            facts={"data": self.data_digest},
        )

    @classmethod
    def from_config(cls, path: str | Path, overrides: Sequence[str] = ()) -> PurifiedOPSDModel:
        """Build model and trainer of a new training run; ``model.trainer.fit(model)`` trains it. Collective.

        Reserves the directory `output` for the run. `popsd train` also evaluates before and after training, exports,
        and resumes or overwrites existing runs.

        Args:
            path: configuration file, such as ``conf/tiny.yaml``.
            overrides: ``key=value`` with dotted keys, as on the command line.

        Raises:
            UserError: the configuration or its files do not fit, or `output` already contains a run.
        """
        config, trainer = start_run(path, overrides)
        return cls(to_dict_config(config), trainer)

    @classmethod
    def restore_from(cls, restore_path: str | Path, *args: object, **kwargs: object) -> Any:
        """Restore from a directory or a `.nemo` file, see `MegatronSaveRestoreConnector`. Collective."""
        if kwargs.get("save_restore_connector") is None:
            kwargs["save_restore_connector"] = MegatronSaveRestoreConnector()
        return super().restore_from(str(restore_path), *args, **kwargs)

    def export_huggingface(self, output: str | Path, *, card: str | None = None) -> None:
        """Write the student as a Hugging Face directory with merged adapters and a model card. Collective.

        Raises:
            UserError: a weight is not finite; on all ranks.
        """
        if on_any_rank(non_finite(self.chunks.parameters())):
            raise non_finite_error(f"export to {output}")
        self.architecture.export(self.student.chunks, output, card=card)

    @classmethod
    def from_pretrained(cls, model_name: str, *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Build an embedded model by name, ready to evaluate or export; `override_config_path` changes settings.

        NeMo's own method downloads an archive; these models are part of the package.

        Raises:
            UserError: no embedded model has this name.
        """
        student = StudentConfig(source=str(asset(model_name)), precision="fp32", adaptation="full")
        tree = to_dict_config(PopsdConfig(student=student))
        if kwargs.get("override_config_path") is not None:
            tree = cast(DictConfig, OmegaConf.merge(tree, kwargs["override_config_path"]))
        return tree if kwargs.get("return_config") else cls(cfg=tree, trainer=trainer)

    @classmethod
    def list_available_models(cls) -> list[PretrainedModelInfo]:
        """Return the embedded model; all other models are local directories."""
        name = "nemo_popsd:tiny_reasoner"
        description = "A tiny long-chain-of-thought reasoner that ships with the package (Hugging Face format)."
        return [PretrainedModelInfo(name, description, location=name, class_=cls)]
