"""Requests that schemathesis makes of the server's description; answers as it declares them.

GPT2_SCHEMATHESIS_REQUESTS=5000 python -m pytest -m schemathesis -o faulthandler_timeout=0
"""

import collections
import json
import os

import hypothesis
import pytest
import requests
from served_model import NAME, serving, started_engine

from gpt_2_simple.serving import api

schemathesis = pytest.importorskip("schemathesis")

pytestmark = pytest.mark.schemathesis

N_REQUESTS = int(os.environ.get("GPT2_SCHEMATHESIS_REQUESTS", "300"))

# Requests that the description allows, and requests that it forbids.
ALLOWED = schemathesis.GenerationMode.POSITIVE
FORBIDDEN = schemathesis.GenerationMode.NEGATIVE

# How many of all requests are such ones, and a status that some of their answers have.
KINDS = [
    ("POST", "/v1/completions", ALLOWED, 0.6, 200),
    ("POST", "/v1/completions", FORBIDDEN, 0.3, 400),
    ("GET", "/v1/models/{model}", ALLOWED, 0.01, 200),
    ("GET", "/v1/models/{model}", FORBIDDEN, 0.07, 404),
    ("GET", "/v1/models", ALLOWED, 0.01, 200),
    ("GET", "/health", ALLOWED, 0.01, 200),
]

CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
]


@pytest.fixture(scope="module")
def description(tmp_path_factory):
    """What a running server says of itself."""
    folder = tmp_path_factory.mktemp("models")
    with (
        started_engine(folder, max_batch=8, max_queue=256) as engine,
        serving(api.make_app({NAME: engine}, api.Limits())) as (address, _),
    ):
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


def check_stream(text):
    """Asserts that each server-sent event holds texts, up to the end."""
    *pieces, last, rest = text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    assert pieces
    for piece in pieces:
        assert json.loads(piece.removeprefix("data: "))["object"] == "text_completion"


@pytest.mark.parametrize(
    ("method", "path", "mode", "share", "status"),
    KINDS,
    ids=lambda value: str(getattr(value, "value", value)),  # modes by their names
)
def test_answers_are_those_that_the_description_declares(
    description, method, path, mode, share, status
):
    checks = [schemathesis.checks.CHECKS.get_one(name) for name in CHECKS]
    answers = collections.Counter()

    @hypothesis.settings(
        max_examples=max(1, round(share * N_REQUESTS)),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=description[path][method].as_strategy(mode))
    def ask(case):
        # Not by schemathesis, which reads the first events of a stream only.
        answer = http.request(timeout=60, **case.as_transport_kwargs())
        case.validate_response(answer, checks=checks)
        kind = answer.headers["content-type"].partition(";")[0]
        answers[answer.status_code, kind] += 1
        if kind == "text/event-stream":
            check_stream(answer.text)

    with requests.Session() as http:
        ask()
    assert any(found == status for found, _ in answers)
