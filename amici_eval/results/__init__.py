"""Results as plain arrays: saving, loading and tables."""
