"""The work of each `popsd` command, after arguments and configuration have been checked."""
