"""What a person at a terminal sees. The command line calls it; nothing else does."""
