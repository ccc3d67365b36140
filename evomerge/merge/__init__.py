"""Operators, resident weights and the in-place builder. `methods.py` is the table to start from."""
