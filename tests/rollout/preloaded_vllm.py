"""What the server of `tests.fork_servers` in vLLM's environment imports: vLLM, and what its servers import later."""

from __future__ import annotations

import contextlib
import gc
import importlib

gc.disable()  # what is imported stays
for _name in (
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.entrypoints.chat_utils",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.core",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.core.kv_cache_manager",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.qwen3",
):
    # Versions differ in their modules; a server imports what is missing here.
    with contextlib.suppress(Exception):
        importlib.import_module(_name)
gc.freeze()
gc.enable()
