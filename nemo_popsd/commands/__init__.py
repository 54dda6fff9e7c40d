"""What each command does, once its arguments and the configuration are checked."""
