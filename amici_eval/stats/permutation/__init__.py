"""Permutation tests: ``nulls`` say what is shuffled, ``statistics`` compute T, ``exact_moments`` its null moments."""
