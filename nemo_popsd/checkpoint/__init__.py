"""Models on disk: Hugging Face directories, NeMo checkpoints and Megatron distributed weights."""
