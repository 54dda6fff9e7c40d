"""The configuration of a run, composed of all sections: the typed schema, loading, checks across sections."""
