"""The NeMo model class, and what the commands do with it."""
