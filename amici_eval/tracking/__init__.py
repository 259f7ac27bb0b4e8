"""MLflow, which no other package knows: where models, data and runs come from and go to."""

# MLflow loads our entry points while it is imported. Importing it here, before any module of this package, lets each of
# them find itself complete when that happens.
import mlflow  # noqa: F401
