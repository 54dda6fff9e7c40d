"""`popsd doctor`: what an environment and a machine have of what a run needs. Works where nothing is installed."""
