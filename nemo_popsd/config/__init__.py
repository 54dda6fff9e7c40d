"""The configuration of a run, composed of all sections: the typed schema, reading, overriding, checks across sections."""
