"""Writes the LoRA adapters of a NeMo checkpoint as a directory that PEFT loads onto the original Hugging Face model.

Megatron fuses query, key and value into one linear layer, and gate and up into another. An adapter on a fused layer has
one A, and one B that is split along its output dimension like the weight. In PEFT's format each linear layer has a copy
of A and its part of B, which is mathematically equal.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from nemo_popsd.checkpoint.finite import non_finite_error
from nemo_popsd.checkpoint.model_card import CARD, base_reference
from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.errors import UserError
from nemo_popsd.files.atomic import new_directory
from nemo_popsd.files.ownership import ADAPTER


def write_peft_adapter(
    checkpoint: NemoCheckpoint, output: Path, *, base: str | None = None, card: str | None = None
) -> None:
    """Writes the adapters and the tokenizer. Runs on this process only. `output` appears when all files are complete.

    Args:
        checkpoint: checkpoint of a run with LoRA.
        output: directory to write; an earlier adapter there is replaced.
        base: Hub name or path by which the adapter refers to its base; None uses `student.source`.
        card: text of the model card; None writes none.

    Raises:
        UserError: the checkpoint has no adapters, or adapters on experts; a weight is NaN or Inf; or nemo_popsd did not
            write what is at `output`.
    """
    student, architecture = checkpoint.config.student, checkpoint.architecture
    if student.adaptation != "lora":
        raise UserError(
            f"checkpoint {checkpoint.directory}",
            got=f"student.adaptation={student.adaptation}",
            need="a checkpoint of a run with LoRA",
            fix="export the merged model, without --adapter",
        )
    if architecture.provider().num_moe_experts is not None:
        raise UserError(
            f"checkpoint {checkpoint.directory}",
            got="adapters on a model with experts",
            need="a dense model: PEFT has no format for adapters that experts share",
            fix="export the merged model, without --adapter",
        )
    weights = checkpoint.adapters()
    tensors, targets = {}, set()
    for name in architecture.tensor_names:
        if (factors := weights.factors(name)) is not None:
            module = name.removesuffix(".weight")
            for letter, factor in zip("AB", factors, strict=True):
                # A clone, since safetensors refuses shared storage; A is shared, and the parts of B are views.
                tensors[f"base_model.model.{module}.lora_{letter}.weight"] = factor.clone()
            targets.add(module.rpartition(".")[2])
    if non_finite := [name for name, factor in tensors.items() if not bool(factor.isfinite().all())]:
        raise non_finite_error(f"checkpoint {checkpoint.directory}", non_finite)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_reference(student.source, base),
        "r": student.lora.rank,
        "lora_alpha": student.lora.alpha,
        "lora_dropout": student.lora.dropout,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_directory(output, ADAPTER) as partial:
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        (partial / "adapter_model.safetensors").chmod(0o644)  # safetensors makes it readable only by its owner.
        (partial / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n")
        architecture.copy_tokenizer(partial)
        if card is not None:
            (partial / CARD).write_text(card, encoding="utf-8")
