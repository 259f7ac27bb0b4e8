"""Positions of cells: lags, neighbours within reach, the spatial null."""
