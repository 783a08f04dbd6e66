"""The command line. Each command is one file; heavy imports happen inside the functions."""
