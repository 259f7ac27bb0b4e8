"""Figures, tables and the page: results go in, axes and files come out, and nothing is computed here."""
