"""On-policy responses: the engine interface, sampling, the Megatron engine, storage; `vllm/` has the vLLM engine."""
