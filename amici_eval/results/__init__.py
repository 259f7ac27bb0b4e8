"""What was found, as plain arrays: saved, loaded, as tables."""
