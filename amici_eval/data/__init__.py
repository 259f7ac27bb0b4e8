"""The tissue: `files` reads each file format, `matrices` rows of expression, `tissue` makes it ready for a model.

`tissue` goes by `checks` (genes, labels, chosen cells), `geometry` (positions) and `membership` (cells of training).
`simulate` draws a tissue with known effects.
"""
