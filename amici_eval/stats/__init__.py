"""Statistics of head evaluation: knows arrays, no model, no AnnData, no MLflow."""
