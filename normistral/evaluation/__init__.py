"""Quality of an artifact (perplexity, KL divergence to a reference, lm-evaluation-harness) and its speed (`bench`).

Independent of export: a reference is known by its predictions alone.
"""
