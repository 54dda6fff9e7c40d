"""The console script `popsd`: one module per sub-command; nothing heavy is imported before a sub-command runs."""
