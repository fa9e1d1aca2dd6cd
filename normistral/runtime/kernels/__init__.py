"""Products of our own where an engine's are slower than memory or processor allow."""
