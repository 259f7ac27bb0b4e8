"""What MLflow Projects passes, and the short names it has for settings, as overrides."""

from __future__ import annotations

from amici_eval.common.errors import InvalidSpecError

_PROJECT_KEYS = {
    "data": "data.uri",
    "device": "ablation.device",
    "n_permutations": "permutation.n_permutations",
    "promote": "gate.promote",
}
_SEED_KEY = {
    "evaluate": "permutation.seed",
    "compare": "permutation.seed",
    "gate": "permutation.seed",
    "watch": "permutation.seed",
    "demo": "seed",
}


def project_overrides(arguments: list[str], command: str = "evaluate") -> list[str]:
    """Turn what MLflow Projects passes (``--key value``) into Hydra overrides.

    An empty value means the default; ``overrides`` is split at spaces as a shell would; names that are short for a
    setting are written out; anything else is passed on as ``key=value``.
    """
    import shlex

    overrides: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--"):
            overrides.append(argument)
            continue
        key = argument[2:]
        if "=" in key:
            key, _, value = key.partition("=")
        elif position < len(arguments):
            value = arguments[position]
            position += 1
        else:
            raise InvalidSpecError(value=f"parameter {argument}", rule="it needs a value", fix=f"pass -P {key}=VALUE")
        if value == "":
            continue
        if key == "overrides":
            try:
                overrides += shlex.split(value)
            except ValueError as error:
                raise InvalidSpecError(
                    value=f"parameter --overrides {value!a:.200}",
                    rule=f"it is split as a shell would ({error})",
                    fix="close the quotation mark, or put a backslash before it",
                ) from error
        elif key == "seed":
            overrides.append(f"{_SEED_KEY.get(command, 'seed')}={value}")
        else:
            overrides.append(f"{_PROJECT_KEYS.get(key, key)}={value}")
    return overrides


def written_out(argument: str, command: str) -> str:
    """Write out the short names that ``mlflow run -P`` takes too, and let users add tags and rules of their own."""
    key, equals, value = argument.partition("=")
    if command in ("evaluate", "compare", "gate", "watch") and key in ("device", "n_permutations", "promote", "seed"):
        key = {**_PROJECT_KEYS, "seed": _SEED_KEY["evaluate"]}[key]
    if key.startswith(("tracking.tags.", "gate.rules.")):
        key = f"++{key}"
    return f"{key}{equals}{value}"
