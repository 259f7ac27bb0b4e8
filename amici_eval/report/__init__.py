"""What people look at: figures, tables, a page. Results go in, axes and files come out; nothing is computed here."""
