"""The command line: one file for each command, called as the command is (parse, call, print), and console helpers."""
