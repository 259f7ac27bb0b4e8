"""Credentials that look real are masked, and what only resembles them is left alone."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from amici_eval.common.errors import DataError, first_line
from amici_eval.common.text import is_secret_name, mask_secrets, masked

seeded = settings(max_examples=300, deadline=None, derandomize=True)
SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCY"
SECRET_NAMES = (
    *("password", "passwd", "passphrase", "client_secret", "auth_token", "credential", "api_key", "api-key"),
    *("access_key", "accountKey", "private_key", "passWord", "SharedAccessSignature", "x-amz-signature"),
    *("connection_string", "pwd", "auth", "cookie", "bearer", "apikey", "sig", "sas", "pass"),
)


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql+psycopg2://mlflow:{SECRET}@db.example.org:5432/mlflow",
        f"POSTGRESQL://mlflow:{SECRET}@db.example.org/mlflow?sslmode=require",
        f"mysql+pymysql://root:a%40{SECRET}%2F@db.example.org:3306/mlflow",
        f"mysql://root:a/{SECRET}@b@db.example.org/mlflow",
        f"mssql+pyodbc://sa:1433/{SECRET}@db/mlflow?driver=ODBC+Driver+18",
        f"HTTPS://user:{SECRET}@mlflow.example.org/api",
        f"https://{SECRET}@dbc-a1b2345c.cloud.example.org",
        f"https://bucket.s3.amazonaws.com/t.h5ad?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature={SECRET}",
        f"https://acc.blob.core.windows.net/c/t.h5ad?sv=2022-11-02&sig={SECRET}%3D",
        f"https://example.org/t.h5ad?token={SECRET} (404 Client Error)",
        f"login failed: password={SECRET}",
        f"login failed: password = '{SECRET}'",
        f"MLFLOW_TRACKING_PASSWORD={SECRET} amici-eval evaluate",
        f"AWS_SECRET_ACCESS_KEY={SECRET}/x+y",
        f"AWS_SESSION_TOKEN: {SECRET}",
        f"headers: {{'Authorization': 'Bearer {SECRET}'}}",
        f"Authorization: Bearer {SECRET}",
        f"authorization=Token {SECRET}",
        f"curl -H 'X-Api-Key: {SECRET}'",
        f"Bearer {SECRET}.{SECRET}",
        f"DefaultEndpointsProtocol=https;AccountName=acc;AccountKey={SECRET}==;EndpointSuffix=core.windows.net",
        f"command --password {SECRET}",
        f'{{"token": "{SECRET}", "n": 3}}',
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----",
        "hf_" + SECRET + "abcdef",
        f"-----BEGIN PRIVATE KEY-----\n{SECRET}",
        f"Proxy-Authorization: Negotiate {SECRET}",
        f"authorization: Digest {SECRET}",
        f"authorization: {SECRET}",
        *(f"{scheme}://user:1234/{SECRET}@db/x" for scheme in "mariadb oracle mongodb redis rediss amqp".split()),
        *(f"amqps+ssl://{SECRET}@queue/x", f"postgres://user:{SECRET}@db/x"),
        *(f"{name}={SECRET}" for name in SECRET_NAMES),
        *(f"{name}: {SECRET}" for name in SECRET_NAMES if name not in {"auth", "bearer", "sas", "sig", "pass"}),
    ],
)
def test_credentials_are_masked_once(text):
    told = mask_secrets(text)
    assert SECRET not in told
    assert "***" in told
    assert mask_secrets(told) == told


def test_basic_credentials_are_masked_and_basic_words_are_not():
    coded = base64.b64encode(b"user:hunter22").decode()
    assert mask_secrets(f"sent Basic {coded}, basic statistics") == "sent Basic ***, basic statistics"


@pytest.mark.parametrize(
    "secret",
    [
        *("AKIAIOSFODNN7EXAMPLE", "ASIAIOSFODNN7EXAMPLE", "github_pat_" + "a1" * 15, "glpat-" + "a1" * 10),
        *(f"gh{kind}_" + "a1" * 18 for kind in "pousr"),
        *(f"xox{kind}-" + "1a" * 8 for kind in "abprs"),
        *("dapi" + "0f" * 16, "AIza" + "a1" * 16, "ya29." + "a1" * 12, "sk_live_" + "a1" * 10, "glsa_" + "a1" * 12),
        *("sk-" + "a1" * 12, "eyJ" + "hbGciOiJI" + ".eyJzdWIiOiIx" + ".c2lnbmF0dXJl"),
    ],
)
def test_keys_that_show_by_their_form_are_masked_wherever_they_stand(secret):
    assert mask_secrets(f"x {secret}.") == "x ***."


def test_a_json_text_stays_one():
    assert json.loads(mask_secrets('{"token": "abc", "uri": "https://a:b@c/d", "n": 3}')) == {
        "token": "***",
        "uri": "https://***@c/d",
        "n": 3,
    }


@pytest.mark.parametrize(
    "text",
    [
        "models:/amici@champion",
        "http://127.0.0.1:5000/models/amici@champion",
        "https://mlflow.example.org:443/#/experiments/1",
        "'http://127.0.0.1:5000' and 'somebody@example.org'",
        "sqlite:////srv/store/mlflow.db",
        "s3://bucket/a@b/tissue.h5ad",
        "abfss://container@account.dfs.core.windows.net/tissue.h5ad",
        "permutation.seed=3 data.subset.key=cell_type n_tokens=4 design=2 passes=1",
        "signal: pass; the token is expired",
        "token: null, password: ''",
        "what is this? a question = none",
        "secretory: 3, secreted=4, secretin: 5, tokenize: 6, tokens: 7",
        "T cell, HLA-DRA, CD8+_T (12:34)",
    ],
)
def test_what_is_no_credential_stays(text):
    assert mask_secrets(text) == text


passwords = st.text(st.sampled_from("abcXYZ019-._~!$&*+,;=:@/%#|^"), min_size=8, max_size=20).filter(
    lambda text: text[0].isalpha() and "//" not in text
)


@seeded
@given(password=passwords, scheme=st.sampled_from(["https", "HTTP", "postgresql", "mysql+pymysql", "S3", "redis"]))
@example(password="p/a@s:s#w?rd", scheme="https")
@example(password="pass@word/12", scheme="postgresql")
def test_whatever_a_password_holds_it_is_masked(password, scheme):
    told = mask_secrets(f"cannot reach {scheme}://somebody:{password}@db.example.org/x: refused")
    assert told == f"cannot reach {scheme}://***@db.example.org/x: refused"


@pytest.mark.parametrize(
    "name", ["token", "tracking.tags.token", "MLFLOW_TRACKING_PASSWORD", "sessionToken", "AccountKey", *SECRET_NAMES]
)
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["key", "subset_key", "sample_key", "n_tokens", "design", "passes", "author", "uri"])
def test_other_names(name):
    assert not is_secret_name(name)


def test_settings_are_masked_by_name_and_by_form_and_not_changed():
    settings_ = {
        "tags": {"token": SECRET, "team": "a", "pin_token": 1234, "none_token": None},
        "uri": f"https://a:{SECRET}@b",
        "list": [f"password={SECRET}", 3],
    }
    before = json.dumps(settings_)
    told = masked(settings_)
    assert told == {
        "tags": {"token": "***", "team": "a", "pin_token": "***", "none_token": None},
        "uri": "https://***@b",
        "list": ["password=***", 3],
    }
    assert json.dumps(settings_) == before


def test_errors_tell_no_credentials():
    error = DataError(value=f"https://a:{SECRET}@b", rule=f"token={SECRET}", fix=f"set AWS_SECRET_ACCESS_KEY={SECRET}")
    assert SECRET not in f"{error}{error!r}{error.args}{error.value}"
    assert SECRET not in first_line(ValueError(f"no answer from postgresql://a:{SECRET}@b"))
