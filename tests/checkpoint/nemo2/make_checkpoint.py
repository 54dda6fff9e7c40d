"""Writes the NeMo 2 checkpoint that the tests read, with nemo_toolkit's LLM collection.

It needs a separate environment:

    python3.11 -m venv /tmp/nemo2
    /tmp/nemo2/bin/pip install torch==2.13.0
    /tmp/nemo2/bin/pip install nemo_toolkit[nlp]==2.7.3 megatron-core==0.15.3 numpy==1.26.4 pyarrow==21.0.0 \
        leptonai==0.26.9 nemo_run==0.11.1
    CUDA_VISIBLE_DEVICES= /tmp/nemo2/bin/python tests/checkpoint/nemo2/make_checkpoint.py OUTPUT

Trains one step with `llm.train` on random tokens and saves the checkpoint. `OUTPUT/expected.safetensors` contains the
logits of the model for a few tokens.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

import torch

# NeMo 2 and megatron-core name the CUDA device literally; these replacements use the CPU.
torch.cuda.current_device = lambda: torch.device("cpu")
torch.cuda.synchronize = lambda *_: None
torch.cuda.set_device = lambda *_: None
torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
torch.cuda.manual_seed = torch.manual_seed
torch.cuda.Stream = lambda *_, **__: None
torch.cuda.stream = lambda *_, **__: contextlib.nullcontext()
torch.cuda.current_stream = lambda *_: None
torch.Tensor.cuda = lambda self, *_, **__: self


def _on_cpu(factory):
    def create(*args, **kwargs):
        kwargs.pop("pin_memory", None)
        return factory(*args, **({**kwargs, "device": "cpu"} if "device" in kwargs else kwargs))

    return create


_to = torch.Tensor.to
torch.Tensor.to = lambda self, *args, **kwargs: _to(self, *("cpu" if a == "cuda" else a for a in args), **kwargs)
torch.cuda.max_memory_reserved = torch.cuda.max_memory_allocated = lambda *_: 0
torch.cuda.empty_cache = lambda: None
for _name in ("tensor", "zeros", "empty", "ones", "full", "arange"):
    setattr(torch, _name, _on_cpu(getattr(torch, _name)))

import megatron.core.tensor_parallel.random as megatron_random  # noqa: E402

megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
# NeMo seeds the random states of tensor parallelism only on CUDA devices.
megatron_random.get_cuda_rng_tracker().add("model-parallel-rng", 1)

import nemo.collections.llm.gpt.data.mock as mock  # noqa: E402
import nemo.lightning as nl  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from nemo.collections import llm  # noqa: E402
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

TOKENIZER = Path(__file__).resolve().parent / "qwen3" / "context" / "tokenizer"

# `MockDataModule` passes `create_attention_mask` in the position of the seed.
_Mock = mock._MockGPTDataset
mock._MockGPTDataset = lambda *args: _Mock(*args[:4], create_attention_mask=True)


def main(output: Path) -> None:
    """Trains, saves, and writes the logits of the model."""
    place = Path(tempfile.mkdtemp()) / "tokenizer"
    shutil.copytree(TOKENIZER, place)
    tokenizer = AutoTokenizer(str(place))
    config = llm.Qwen3Config(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=12,
        ffn_hidden_size=48,
        seq_length=64,
        vocab_size=396,
        share_embeddings_and_output_weights=False,
        make_vocab_size_divisible_by=128,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        cross_entropy_loss_fusion=False,
        persist_layer_norm=False,
        init_method_std=0.2,
        use_cpu_initialization=True,
    )
    model = llm.Qwen3Model(config, tokenizer=tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = nl.Trainer(
            devices=1,
            accelerator="cpu",
            max_steps=1,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            log_every_n_steps=1,
            strategy=nl.MegatronStrategy(
                ddp="megatron", gradient_accumulation_fusion=False, ckpt_async_save=False, save_optim_on_train_end=False
            ),
        )
        llm.train(
            model,
            data=llm.MockDataModule(
                tokenizer=tokenizer, seq_length=16, micro_batch_size=1, global_batch_size=1, num_workers=0
            ),
            trainer=trainer,
            log=nl.NeMoLogger(
                log_dir=folder,
                ckpt=nl.ModelCheckpoint(
                    save_last=True, every_n_train_steps=1, save_top_k=-1, save_optim_on_train_end=False
                ),
            ),
            optim=nl.MegatronOptimizerModule(
                config=OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=0.0, use_distributed_optimizer=False)
            ),
        )
        [saved] = {path.parent for path in Path(folder).rglob("context") if "-last" in path.parent.name}
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(saved, output)
    ids = torch.tensor([[7, 3, 11, 5, 2, 13, 17, 19, 23, 29]])
    with torch.no_grad():
        logits = (
            model.module.cpu()
            .float()
            .eval()(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None], attention_mask=None)
        )
    save_file({"ids": ids, "logits": logits.float().contiguous()}, output / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
