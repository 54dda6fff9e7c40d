"""`popsd doctor`: checks an environment and a machine for what a run needs. Works without any installed package."""
