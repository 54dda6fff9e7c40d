"""Files and directories that the project writes, replaces, reads strictly, locks and owns."""
