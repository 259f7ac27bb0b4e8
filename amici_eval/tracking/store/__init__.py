"""Asking a store: errors and retries, searches, fetched data."""
