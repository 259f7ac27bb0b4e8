"""What a user may choose, with its checks."""
