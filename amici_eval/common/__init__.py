"""What every package may use: errors, safe text, safe files, threads, memory."""
