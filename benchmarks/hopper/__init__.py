"""Calls for a machine with a GPU."""
