"""The only package that imports AMICI: saves and loads it, intervenes on its heads, runs it on a tissue."""
