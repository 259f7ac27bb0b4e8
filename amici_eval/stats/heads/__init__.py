"""How alike heads are, and which of two models belong together."""
