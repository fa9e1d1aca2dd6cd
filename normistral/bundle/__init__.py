"""One file that carries an artifact and its runtime to a machine without a network."""
