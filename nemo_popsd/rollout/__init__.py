"""On-policy responses: the engine interface, sampling, and the engine inside the training process."""
