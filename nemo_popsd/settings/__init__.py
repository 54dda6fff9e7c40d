"""How a section of the configuration declares its settings: bounds, checks and the errors that name a setting."""
