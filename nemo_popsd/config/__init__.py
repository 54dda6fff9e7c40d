"""The configuration of a run: the typed schema, reading and overriding it, and the checks before anything is built."""
