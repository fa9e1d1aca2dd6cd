"""Checkpoint → recipe → format → verify → manifest. Needs the extra `export`."""
