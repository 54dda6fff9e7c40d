"""The commands of `popsd`, after their arguments and the configuration have been checked."""
