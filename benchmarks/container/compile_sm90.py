"""Compiles the kernels of the loss for an H100, without a GPU: by inductor and Triton to machine code for sm_90.

    python -m benchmarks.container.compile_sm90      torch's CUDA build; no driver

The kernels of `distillation/closed_form.py` are traced on the CPU (their indexing would need a driver), lowered by
inductor for fake CUDA inputs with an H100's properties, and the first configuration of each is compiled by Triton and
its assembler. Shapes are static here and symbolic in training, so the kernels of a run differ.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.container.fake_cuda import GPU, pretend_driver
from benchmarks.tables import table

_ROWS, _VOCABULARY = 104, 151936
_H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    gcnArchName="",
    L2_cache_size=50 << 20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
)


def _pretend_h100(kernels: list[tuple[str, str]]) -> None:
    """Makes inductor and Triton assume an H100 for the rest of the process; `kernels` collects inductor's kernels."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.async_compile import AsyncCompile
    from torch.utils import _triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    pretend_driver()
    stream = types.SimpleNamespace(cuda_stream=0, device_index=0, stream_id=0, device_type=1, device=GPU)
    for owner, answers in (
        (
            torch.cuda,
            {
                "get_device_properties": _H100,
                "_get_device_properties": _H100,
                "_exchange_device": 0,
                "_maybe_exchange_device": 0,
                "current_stream": stream,
                "set_rng_state": None,
            },
        ),
        (torch.accelerator, {"is_available": False, "current_device_index": 0, "current_stream": stream}),
        (torch._C, {"_cuda_getDevice": 0}),
        (_triton, {"has_triton": True, "has_triton_package": True}),
        (
            CudaInterface,
            {
                "get_device_properties": _H100,
                "get_compute_capability": 90,
                "is_available": True,
                "is_triton_capable": True,
                "raise_if_triton_unavailable": None,
                "current_device": 0,
                "device_count": 1,
            },
        ),
        (CudaInterface.Worker, {"get_device_properties": _H100, "current_device": 0}),
    ):
        for name, answer in answers.items():
            function = lambda *_, answer=answer, **__: answer  # noqa: E731
            setattr(owner, name, staticmethod(function) if isinstance(owner, type) else function)
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()

    class Driver(CudaDriver):
        def __init__(self) -> None: ...

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, *_: Any) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return GPU

    driver.set_active(Driver())
    driver._default = driver._active

    def capture(self: Any, kernel_name: str, source_code: str, device_str: str = "cuda") -> Callable[..., None]:
        kernels.append((kernel_name, source_code))
        return lambda *_, **__: None

    AsyncCompile.triton = capture


def _lower(function: Callable[..., Any], arguments: Sequence[Any], mode: Any) -> None:
    """Makes inductor write the kernels of `function` for `arguments`, fake CUDA tensors in any nesting."""
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp
    from torch.utils import _pytree as pytree

    flat, spec = pytree.tree_flatten(arguments)

    def on_flat(*tensors: Tensor) -> list[Tensor]:
        outputs = function(*pytree.tree_unflatten(list(tensors), spec))
        return [output for output in pytree.tree_leaves(outputs) if output is not None]

    traced = make_fx(
        torch.func.functionalize(on_flat, remove="mutations"),
        decomposition_table=select_decomp_table(),
        tracing_mode="fake",
    )(*[torch.empty(x.shape, dtype=x.dtype) for x in flat])
    for node in traced.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": GPU}
    FakeTensorProp(traced, mode).propagate_dont_convert_inputs(*flat)
    with V.set_fake_mode(mode), tracing(TracingContext(mode)):
        compile_fx_inner(traced, flat)


def _cases(mode: Any) -> list[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    from nemo_popsd.distillation import closed_form

    with mode:

        def f32(*shape: int) -> Tensor:
            return torch.empty(shape, device=GPU)

        constants = closed_form.Constants(*(f32() for _ in closed_form.Constants._fields))
        s, t, d = (f32(_ROWS, _VOCABULARY) for _ in range(3))
        mean, weight, divergence = (f32(_ROWS) for _ in range(3))
        measures = f32(1, closed_form.SHARD_STATS, _ROWS)
        out = torch.empty(_ROWS, _VOCABULARY, dtype=torch.bfloat16, device=GPU)
    return [
        ("shard_stats", closed_form.shard_stats, (s, t, d, mean, constants)),
        ("jsd_mixture", closed_form.jsd_mixture, (s, t, measures, constants)),
        ("jsd_grad", closed_form.jsd_grad, (s, t, divergence, weight, out, constants)),
        ("forward_kl_grad", closed_form.forward_kl_grad, (s, t, measures, weight, out)),
        ("reverse_kl_grad", closed_form.reverse_kl_grad, (s, t, measures, weight, out)),
    ]


def _assembled(name: str, source: str, directory: Path) -> list[str]:
    """Registers, spilled bytes, shared memory and size of the kernel's first configuration."""
    file = directory / f"{name}_{abs(hash(source))}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tuner = getattr(module, name)
    configuration = tuner.configs[0]
    compiled = tuner._precompile_config(configuration).kernel
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    registers, stack = _resources(cubin)
    return [str(configuration.num_warps), registers, stack, str(compiled.metadata.shared), str(cubin.stat().st_size)]


def _resources(cubin: Path) -> tuple[str, str]:
    """Registers, and bytes of stack to which registers spill, from Triton's cuobjdump."""
    import triton

    tools = [*Path(triton.__file__).parent.rglob("cuobjdump")]
    if not tools:
        return "?", "?"
    output = subprocess.run([tools[0], "--dump-resource-usage", cubin], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+).*?STACK:(\d+)", output, re.DOTALL)
    return (found[1], found[2]) if found else ("?", "?")


def main() -> int:
    """Runs the command; returns 1 if a function has no kernel or one does not compile."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
        }
        import torch._inductor.config

        torch._inductor.config.compile_threads = 1
        torch._inductor.config.use_static_cuda_launcher = False  # it would load the compiled kernel
        kernels: list[tuple[str, str]] = []
        _pretend_h100(kernels)
        from torch._subclasses.fake_tensor import FakeTensorMode

        mode = FakeTensorMode()
        for function, body, arguments in _cases(mode):
            before = len(kernels)
            try:
                _lower(body, arguments, mode)
            except Exception as error:  # the steps after writing the kernels need a driver
                if len(kernels) == before:
                    rows.append([function, f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}"])
                    failed += 1
            for name, source in kernels[before:]:
                try:
                    rows.append([function, name, *_assembled(name, source, Path(folder))])
                except Exception as error:
                    failed += 1
                    rows.append([function, name, f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}"])
    header = ["function", "kernel", "warps", "registers", "stack bytes", "shared bytes", "cubin bytes"]
    print(table(header, [row + [""] * (len(header) - len(row)) for row in rows]))
    return int(failed > 0 or not rows)


if __name__ == "__main__":
    sys.exit(main())
