"""Where cells lie: tiles, pairs by distance, and the nulls that use it; each has a module (``lag_test``, ``torus``)."""
