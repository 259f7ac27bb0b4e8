"""The one room that knows MLflow: flavor, dataset, evaluator, registry, runs."""
