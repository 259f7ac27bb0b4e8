"""z of every head: the hooked engine, the truth, and the factored one, its fast equal."""
