"""Does purification do what the paper says, on a model that a laptop trains? One command per table; see README.md."""
