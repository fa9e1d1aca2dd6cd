"""Verification of a written artifact, part by part; artifact.py puts the parts in order.

Each part compares the artifact's files with the checkpoint and names what differs, so that a failure says its cause
before the last part, the logits, would only say that there is one.
"""

CAUSE = "the artifact was changed after it was written, or the exporter has a bug: export again, and report it"
