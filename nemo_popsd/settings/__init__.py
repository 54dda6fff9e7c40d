"""How settings are declared, not which ones exist: bounds, checks, and errors that name the setting."""
