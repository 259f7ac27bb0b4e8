"""Outputs and predictions of each head: the hooked engine (reference) and the factored one (fast)."""
