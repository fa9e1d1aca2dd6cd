"""One archive that installs a model on a machine without a network."""
