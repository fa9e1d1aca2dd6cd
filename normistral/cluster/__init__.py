"""Replicas of the server behind Ray Serve."""
