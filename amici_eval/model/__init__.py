"""The one room that knows AMICI: save and load it, intervene on its heads, run it on a tissue."""
