"""The only package that knows AMICI: saves and loads it, intervenes on its heads, runs it on a tissue."""
