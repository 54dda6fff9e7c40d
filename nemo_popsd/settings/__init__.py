"""Declaration of settings: bounds, checks, and errors that name the setting. The settings themselves are elsewhere."""
