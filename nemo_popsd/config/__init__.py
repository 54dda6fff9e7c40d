"""The complete configuration of a run: the typed schema, loading, and checks across sections."""
