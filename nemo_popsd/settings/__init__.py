"""Declaration of settings in a section of the configuration: bounds, checks and errors that name the setting."""
