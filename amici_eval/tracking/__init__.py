"""All use of MLflow: models, data and runs in the tracking store."""

# MLflow loads our entry points while it is imported. It is imported before any module of this package, so that it finds
# none of them half initialised.
import mlflow  # noqa: F401
