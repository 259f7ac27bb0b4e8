"""Head metrics while AMICI trains."""
