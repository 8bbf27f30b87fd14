"""Passes: a program in, a better program out, under a contract."""
