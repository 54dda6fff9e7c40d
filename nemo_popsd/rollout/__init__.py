"""On-policy responses: the engine interface, sampling, the engine in the training processes, storage; vLLM below."""
