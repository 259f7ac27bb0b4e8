"""Ablations of heads: coalitions, Shapley values, substitutions."""
