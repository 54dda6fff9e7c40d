"""Models on disk: Hugging Face directories, NeMo checkpoints, Megatron distributed weights."""
