"""What a prediction loses without heads: coalitions, Shapley values, substitutions."""
