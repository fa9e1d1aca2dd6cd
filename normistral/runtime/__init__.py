"""Template → engine → sampling, stopping → generate → session. Needs no torch and no transformers."""
