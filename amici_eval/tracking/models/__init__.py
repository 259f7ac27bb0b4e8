"""Registered models: found, opened, tagged."""
