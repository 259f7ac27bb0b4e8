"""The one room that knows MLflow: flavor, dataset, evaluator, registry, runs."""

# MLflow loads our entry points while it is imported. Importing it here, before any module of this room, lets each of
# them find itself complete when that happens.
import mlflow  # noqa: F401
