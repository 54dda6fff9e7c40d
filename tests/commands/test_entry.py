"""How the commands use their configuration."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from tests.harness import run_ranks


def open_full_checkpoint(rank: int, world_size: int) -> tuple[bool, Any]:
    """Opens a checkpoint of full fine-tuning under a configuration with adapters."""
    from nemo_popsd.commands import entry
    from nemo_popsd.config.schema import PopsdConfig
    from nemo_popsd.megatron.config import StudentConfig

    written = PopsdConfig(student=StudentConfig(adaptation="full", source="nemo_popsd:tiny_reasoner"))
    entry.NemoCheckpoint = lambda path: SimpleNamespace(config=written)  # type: ignore[assignment,misc]
    config = PopsdConfig(student=StudentConfig(adaptation="lora", source="elsewhere", precision="fp32"))
    before = copy.deepcopy(config)
    used, _ = entry._open(config, "checkpoint")
    return config == before, used.student


def test_the_adaptation_of_a_checkpoint_is_used_and_the_callers_configuration_is_unchanged() -> None:
    ((unchanged, student),) = run_ranks(open_full_checkpoint, 1)
    assert unchanged
    assert (student.adaptation, student.source, student.precision) == ("full", "nemo_popsd:tiny_reasoner", "fp32")


def export_run_in_fp8(rank: int, world_size: int) -> Any:
    """The section `fp8` of the configuration with which a run in FP8 is exported."""
    from nemo_popsd.commands import entry
    from nemo_popsd.config.schema import PopsdConfig
    from nemo_popsd.megatron.config import FP8Config

    seen: list[Any] = []
    written = PopsdConfig(fp8=FP8Config(frozen=True, training=True))
    module: Any = entry
    module.NemoCheckpoint = lambda path: SimpleNamespace(config=written)
    module._refuse_as_output = module.card_of = module.run_of = module.shutdown = lambda *_, **__: None
    module.to_dict_config = seen.append
    module.PurifiedOPSDModel = SimpleNamespace(
        restore_from=lambda *_, **__: SimpleNamespace(export_huggingface=lambda *_, **__: None)
    )
    entry.export("checkpoint", "output", options=SimpleNamespace())  # type: ignore[arg-type]
    return seen[0].fp8.passes


def test_a_run_in_fp8_is_exported_without_a_gpu() -> None:
    assert run_ranks(export_run_in_fp8, 1) == [()]
