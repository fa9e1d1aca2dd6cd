"""The commands, one file for each kind: what they take, check and call. cli.py puts them together."""
