"""What a command does: evaluate, compare, gate, watch, promote, upload."""
