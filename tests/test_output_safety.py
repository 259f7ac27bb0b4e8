"""End to end: hostile names stay names, and planted secrets are in nothing that an evaluation leaves behind."""

from __future__ import annotations

import base64
import http.server
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING
from urllib.parse import quote
from xml.etree import ElementTree

import mlflow
import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt
from omegaconf import OmegaConf

import amici_eval
from amici_eval.cli.config import resolved_yaml
from amici_eval.common.errors import DataError
from amici_eval.common.text import csv_text, printable, slugify
from amici_eval.comparison.gate import judge
from amici_eval.report.tables import read_csv
from amici_eval.report.verdict_files import write_verdict, write_verdict_page
from amici_eval.settings.comparison import GateSpec, Rule
from amici_eval.settings.evaluation import DataSpec, EvaluationSpec, PermutationSpec, ReportSpec
from amici_eval.tracking.jobs.evaluating import evaluate_job
from amici_eval.tracking.runs.delivery import evaluation_metrics, metric_intervals
from tests.builders import job_options
from tests.report.test_evaluation_page import Page

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.amici

HOSTILE = (
    "<script>alert(1)</script>",
    '=HYPERLINK("http://x","y")',
    "../../etc/passwd",
    '"><img src=x onerror=alert(1)>',
    "@SUM(A1)",
    "a|b",
    "`x`",
    r"$\alpha",
    "]]>",
    "+1",
    "-1+1",
)
QUICK = EvaluationSpec(permutation=PermutationSpec(n_permutations=19))


def evaluated(model_uri: str, data: str, folder: Path, *, spec=QUICK, config="a: 1\n", **tracking):
    tracking = {"output_dir": str(folder), "keep_local": True, **tracking}
    options = job_options(spec, report=ReportSpec(), config_yaml=config, **tracking)
    return evaluate_job(model_uri, data_uri=data, options=options)


def with_hostile_names(trained, adata):
    """Return the model and its tissue with other names for all types, the first genes, and the sections."""
    card = trained.card
    types = dict(zip(card.cell_types, HOSTILE, strict=False))
    genes = dict(zip(card.genes, HOSTILE, strict=False))
    adata = adata.copy()
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories(types)
    adata.var_names = [genes.get(name, name) for name in adata.var_names]
    adata.obs["section"] = pd.Categorical(np.full(adata.n_obs, HOSTILE[0]))
    card = replace(
        card,
        cell_types=tuple(types[name] for name in card.cell_types),
        genes=tuple(genes.get(name, name) for name in card.genes),
        training_data=None,
    )
    return replace(trained, card=card), adata


def files_below(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def hostile(_registry, _tissue, amici_dir, tmp_path_factory):
    from amici_eval.model.checkpoint import read_amici_directory

    model, tissue = with_hostile_names(read_amici_directory(amici_dir, adata=_tissue.copy(), trust=False), _tissue)
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "data").mkdir()
    tissue.write_h5ad(folder / "data" / "tissue.h5ad")
    spec, uri = replace(QUICK, data=DataSpec(sample_key="section")), mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setenv("MLFLOW_TRACKING_URI", _registry.uri)
        mlflow.set_tracking_uri(_registry.uri)
        mlflow.set_experiment("Default")
        patched.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
        try:
            with mlflow.start_run():
                amici_eval.log_model(model, registered_model_name="hostile")
            before = set(files_below(folder))
            result = evaluated("models:/hostile/1", "data/tissue.h5ad", folder / "out", spec=spec)
            new = {name for name in set(files_below(folder)) - before if not name.startswith("mlruns/")}
        finally:
            mlflow.set_tracking_uri(uri)
    evaluation = result.evaluation
    rules = [
        Rule(name=name, kind="metric", metric=f"ev_full_model/{slugify(name)}", at_least=0.9) for name in HOSTILE[:5]
    ]
    verdict = judge(
        evaluation,
        GateSpec(rules=tuple(rules), allow_in_sample=True),
        metrics=evaluation_metrics(evaluation),
        tables=lambda name: {"heads": evaluation.heads()}[name],
        intervals=metric_intervals(evaluation),
        model={"name": HOSTILE[0], "version": HOSTILE[2]},
        baseline={"name": "![x](http://example.org/x.png)", "version": "1"},
        notes=HOSTILE,
    )
    write_verdict(verdict, folder / "out" / "verdict")
    write_verdict_page(verdict, folder / "out" / "verdict")
    return SimpleNamespace(result=result, verdict=verdict, folder=folder / "out", new=new)


def test_a_hostile_tissue_makes_files_of_names_and_nothing_else(hostile):
    evaluation, files = hostile.result.evaluation, files_below(hostile.folder)
    assert set(evaluation.cell_types) == set(HOSTILE[:5])
    assert set(HOSTILE) <= set(evaluation.genes)
    assert all(name.startswith("out/") for name in hostile.new), "nothing is written elsewhere"
    drawn = [name for name in files if "heatmap" in name]
    assert len(drawn) == 2 * len(evaluation.cell_types)

    for name, path in files.items():
        if name.endswith((".svg", ".xml")):
            root = ElementTree.parse(path).getroot()
            tags = {str(e.tag).rpartition("}")[2] for e in root.iter()}
            assert not tags & {"script", "img", "foreignObject", "iframe", "a"}
            addresses = [value for e in root.iter() for key, value in e.attrib.items() if key.endswith("href")]
            assert all(value.startswith(("#", "data:image/png;")) for value in addresses)
            assert not [key for e in root.iter() for key in e.attrib if key.lower().startswith("on")]
        if name.endswith(".html"):
            page = Page(path.read_text(encoding="utf-8"))
            assert [tag for tag, _ in page.elements].count("script") == 1
            assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
            assert not {"img", "iframe", "object", "embed", "link", "base", "form"} & {tag for tag, _ in page.elements}
            assert all(value.startswith(("#", "data:image/png;")) for value in page.attributes("href"))
            assert HOSTILE[0] in page.text

    texts = {
        "".join(element.itertext())
        for name, path in files.items()
        if name.endswith(".svg")
        for element in ElementTree.parse(path).iter()
        if str(element.tag).endswith("}text")
    }
    assert set(HOSTILE[:5]) <= texts
    assert set(HOSTILE[5:]) <= texts, "genes of the heatmaps are drawn as they are"


def test_tables_give_the_names_back_and_spreadsheets_no_formulas(hostile):
    evaluation = hostile.result.evaluation
    tables = hostile.folder / hostile.result.run_id / "artifacts" / "tables"
    raw = pd.read_csv(tables / "explained_variance.csv", dtype=str, keep_default_na=False)
    assert set(raw["ct_name"]) == {csv_text(name) for name in evaluation.cell_types}
    assert set(raw["gene"]) == {csv_text(name) for name in evaluation.genes}
    assert "'+1" in set(raw["gene"])
    assert raw["expl_var_head_gene"].str.startswith("-").any(), "negative numbers stay numbers"
    again = read_csv(tables / "explained_variance.csv", dtype={"gene": str}, keep_default_na=False)
    frame = evaluation.to_frame()
    assert again["ct_name"].tolist() == frame["ct_name"].tolist()
    assert again["gene"].tolist() == frame["gene"].tolist()
    parquet = pd.read_parquet(tables / "explained_variance.parquet")
    assert parquet["gene"].tolist() == frame["gene"].tolist()
    labels = read_csv(tables / "labels.csv")
    assert dict(zip(labels["label"], labels["slug"], strict=True)) == {n: slugify(n) for n in evaluation.cell_types}
    for path in sorted(tables.glob("*.csv")):
        cells = pd.read_csv(path, dtype=str, keep_default_na=False)
        for column in cells:
            risky = cells[column][cells[column].str.match(r"[=+\-@\t\r]")]
            assert pd.to_numeric(risky, errors="coerce").notna().all(), (path.name, column)


def test_a_hostile_verdict_is_one_table_and_its_note_one_block(hostile):
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(
        (hostile.folder / "verdict" / "verdict.md").read_text(encoding="utf-8")
    )
    kinds = {one.type for token in tokens for one in (token, *(token.children or []))}
    assert not kinds & {"html_inline", "html_block", "image", "link_open", "code_inline", "fence"}
    cells = [token.content for token in tokens if token.type == "inline"]
    assert sum(token.type == "tr_open" for token in tokens) == 1 + len(hostile.verdict.results)
    assert sum(token.type == "td_open" for token in tokens) == 6 * len(hostile.verdict.results)
    assert cells[0].replace("\\", "").endswith(f"{HOSTILE[2]}: {hostile.verdict.outcome}")
    cases = ElementTree.parse(hostile.folder / "verdict" / "verdict.xml").findall(".//testcase")
    assert [case.get("name") for case in cases] == [printable(result.rule) for result in hostile.verdict.results]
    note = (
        mlflow.MlflowClient(hostile.result.tracking_uri).get_run(hostile.result.run_id).data.tags["mlflow.note.content"]
    )
    (block,) = MarkdownIt().parse(note)
    assert block.type == "fence"


def test_names_that_collide_are_refused_before_the_run(registry, trained, adata, tmp_path):
    # found by trying: the same readable part and the same 32 bits of the hash
    one, other = "++////+/++/+//+++/", "+///+//+/+/+/++/++"
    assert slugify(one) == slugify(other)
    names = dict(zip(trained.card.cell_types, (one, other, "b", "c", "d"), strict=True))
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories(names)
    card = replace(trained.card, cell_types=tuple(names.values()), training_data=None)
    with mlflow.start_run():
        amici_eval.log_model(replace(trained, card=card), registered_model_name="colliding")
    adata.write_h5ad(tmp_path / "colliding.h5ad")
    with pytest.raises(DataError, match=r"have the same name .* for files"):
        evaluated("models:/colliding/1", str(tmp_path / "colliding.h5ad"), tmp_path / "out")
    assert not files_below(tmp_path / "out")


SECRETS = {
    "password": "tr0ub4dor/and@three",
    "signature": "5c1d9f3ab0c7e2d4f6a8",
    "tag": "made-up-credential-77",
    "key": "AKIAIOSFODNN7EXAMPLE",
    "bearer": "c2VjcmV0LWJlYXJlci10b2tlbg",
    "run": "hunter22hunter22",
    "model": "glpat-a1b2c3d4e5f6a7b8c9d0",
}


@contextmanager
def served(data: Path) -> Iterator[str]:
    """Serve a file to those who know user, password and signature; yield host and port."""
    wanted = "Basic " + base64.b64encode(f"reader:{SECRETS['password']}".encode()).decode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.headers.get("Authorization") != wanted or SECRETS["signature"] not in self.path:
                self.send_error(403)
                return
            content = data.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_planted_secrets_are_nowhere(registry, tmp_path, caplog, capfd):
    client = mlflow.MlflowClient()
    client.set_model_version_tag("tiny", "1", "pipeline", f"token={SECRETS['model']}")
    client.set_logged_model_tags(registry.model_id, {"pipeline_token": SECRETS["model"]})
    tags = {
        "token": SECRETS["tag"],
        "team": "breast",
        "deploy": f"AWS_ACCESS_KEY_ID={SECRETS['key']}",
        "header": f"Authorization: Bearer {SECRETS['bearer']}",
    }
    caplog.set_level("DEBUG", logger="amici_eval")
    with served(registry.data) as host:
        uri = f"http://reader:{quote(SECRETS['password'], safe='')}@{host}/tissue.h5ad"
        uri += f"?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature={SECRETS['signature']}"
        name = f"nightly password={SECRETS['run']}"
        config = OmegaConf.create({"data": {"uri": uri}, "tracking": {"tags": tags, "run_name": name}})
        # an experiment of its own: a store keeps the source of a dataset that it knows already
        known = {"tags": tags, "run_name": name, "experiment": "planted"}
        result = evaluated("models:/tiny/1", uri, tmp_path / "out", config=resolved_yaml(config), **known)
        with pytest.raises(DataError) as refused:
            evaluated("models:/tiny/1", uri[:-1], tmp_path / "out2")
    run = client.get_run(result.run_id)
    got = Path(mlflow.artifacts.download_artifacts(run_id=result.run_id, dst_path=str(tmp_path / "got")))
    local = files_below(tmp_path / "out")
    assert f"{result.run_id}/upload.json" in local
    assert f"{result.run_id}/artifacts/config/resolved.yaml" in local
    written = {**local, **{f"artifact {name}": path for name, path in files_below(got).items()}}
    told = {name: path.read_bytes() for name, path in written.items()}
    told |= {
        "run": repr(run.to_dictionary()).encode(),
        "inputs": repr(run.inputs.to_dictionary()).encode(),
        "log": caplog.text.encode(),
        "streams": "".join(capfd.readouterr()).encode(),
        "error": f"{refused.value!r} {refused.value}".encode(),
    }
    for what, content in told.items():
        for kind, secret in SECRETS.items():
            for form in {secret, quote(secret, safe="")}:
                assert form.encode() not in content, f"the {kind} is in {what}"
    assert run.data.tags["team"] == "breast", "what is no secret is kept"
    assert run.data.tags["token"] == "***"
    assert run.info.run_name == "nightly password=***"
    assert "***@127.0.0.1" in run.inputs.dataset_inputs[0].dataset.source
    loaded = OmegaConf.create((got / "config" / "resolved.yaml").read_text())
    assert loaded.tracking.tags.token == "***"
    assert loaded.tracking.tags.team == "breast"
