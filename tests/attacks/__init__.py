"""Attacks on the promises, in child processes where they may do harm."""
