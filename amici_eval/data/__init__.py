"""Opens a tissue, chooses its cells and genes, and simulates one."""
