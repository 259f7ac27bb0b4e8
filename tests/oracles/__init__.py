"""Slow references that say a definition word for word; fast code is compared with them."""
