"""LoRA adapters of a NeMo checkpoint as a directory that PEFT puts onto the original Hugging Face model.

Megatron keeps query, key and value as one linear, and gate and up as another. Its adapter there has one A for all of
them and one B, whose rows are split as those of the weight are. In PEFT's form each linear has a copy of A and its own
rows of B, which computes the same.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.errors import UserError
from nemo_popsd.files.atomic import new_directory
from nemo_popsd.files.ownership import ADAPTER


def write_peft_adapter(checkpoint: NemoCheckpoint, output: Path) -> None:
    """Writes the adapters alone, from this process alone. Nothing stands at `output` until all is written.

    Args:
        checkpoint: of a run with LoRA.
        output: directory to make; an earlier adapter there is replaced.

    Raises:
        UserError: the checkpoint has no adapters, or adapters on experts; or `output` is not ours to replace.
    """
    student, architecture = checkpoint.config.student, checkpoint.architecture
    if student.adaptation != "lora":
        raise UserError(
            f"checkpoint {checkpoint.directory}",
            got=f"student.adaptation={student.adaptation}",
            need="a checkpoint of a run with LoRA",
            fix="export the whole model, without --adapter",
        )
    if architecture.provider().num_moe_experts is not None:
        raise UserError(
            f"checkpoint {checkpoint.directory}",
            got="adapters on a model with experts",
            need="a dense model: PEFT has no form for adapters that experts share",
            fix="export the whole model, without --adapter",
        )
    weights = checkpoint.adapters()
    tensors, targets = {}, set()
    for name in architecture.tensor_names:
        if (factors := weights.factors(name)) is not None:
            module = name.removesuffix(".weight")
            for letter, factor in zip("AB", factors, strict=True):
                # A clone: linears that share one A, and rows of one B, share storage, which safetensors refuses.
                tensors[f"base_model.model.{module}.lora_{letter}.weight"] = factor.clone()
            targets.add(module.rpartition(".")[2])
    if bad := [name for name, factor in tensors.items() if not bool(factor.isfinite().all())]:
        raise UserError(
            f"checkpoint {checkpoint.directory}",
            got=f"NaN or Inf in {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else ""),
            need="finite weights",
            fix="export an earlier checkpoint",
        )
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": student.source,
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
        (partial / "adapter_model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner alone.
        (partial / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n")
        architecture.copy_tokenizer(partial)
