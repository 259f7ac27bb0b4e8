"""Intervals and changes over tiles of tissue."""
