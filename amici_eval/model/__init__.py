"""The only package that imports AMICI: saves and loads it, trains it, and runs it on a tissue.

`checkpoint` is a trained model: `unpickling` reads it from what AMICI.save wrote, `manifest` from what is stored here.
`cards` says what the evaluation must know of a model, `training` makes one, and `engines` compute its predictions.
"""
