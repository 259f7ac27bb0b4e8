"""`amici-eval watch ...` in a process of its own, with a gate that passes every version."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace

from amici_eval.settings import comparison as gate_settings

KEY = "0123456789ab"


def gate_job(*, model_uri, baseline, data_uri, comparison, gate, options, newer_only):
    from mlflow import MlflowClient

    from amici_eval.common.errors import DataError

    name, version = model_uri.removeprefix("models:/").split("/")
    if data_uri == "broken":
        raise DataError(value="no data", rule="there must be some", fix="pass data.uri")
    assert newer_only, "a watcher turns back no decision"
    assert "model:" in options.config_yaml
    options.progress(1, 1, "judging")
    MlflowClient().set_model_version_tag(name, version, f"amici_eval.verdict.{KEY}", "pass abc")
    return SimpleNamespace(verdict=SimpleNamespace(outcome="pass"), run_id="abc", promotion=None, outdated=False)


if __name__ == "__main__":
    double = types.ModuleType("amici_eval.tracking.jobs.gating")
    double.gate_job = gate_job
    sys.modules[double.__name__] = double
    gate_settings.gate_key = lambda **_: KEY
    from amici_eval.cli.commands import main

    main(["watch", *sys.argv[1:]])
