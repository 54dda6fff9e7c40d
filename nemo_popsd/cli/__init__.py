"""The console script `popsd`: one module per sub-command. Large packages are imported only when a sub-command runs."""
