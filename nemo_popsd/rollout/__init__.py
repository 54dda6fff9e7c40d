"""On-policy responses: the interface of engines, sampling, Megatron's engine, storage; `vllm/` has the engine vLLM."""
