"""Versions of a model against each other, and the gate that judges them."""
