"""Runs: started, kept alive, written, delivered, taken up again."""
