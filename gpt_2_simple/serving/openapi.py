"""The settings of a completion in, the API's OpenAPI description out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..common.settings import Field, fields_of
from .settings import STRUCTURED_PARAMETERS, CompletionSettings

_JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}


def describe(
    version: str, models: Mapping[str, int], max_choices: int, has_key: bool
) -> dict[str, Any]:
    """The description, as JSON.

    Args:
        version: of the library.
        models: the names that may be asked for, and how many tokens each context holds.
        max_choices: the most texts for a prompt.
        has_key: whether requests need a key.
    """
    paths = {
        "/v1/completions": {"post": _completions()},
        "/v1/models": {"get": _get("The models", "ModelList", 401, 403)},
        "/v1/models/{model}": {
            "get": {
                "parameters": [
                    {
                        "name": "model",
                        "in": "path",
                        "required": True,
                        "schema": {"type": "string", "enum": list(models)},
                    }
                ],
                **_get("A model", "Model", 401, 403, 404),
            }
        },
        "/health": {"get": _get("Whether the server can answer", "Health", 403, 503)},
    }
    schemas = {
        "CompletionRequest": _completion_request(models, max_choices),
        "Completion": _object(
            {
                "id": {"type": "string"},
                "object": {"const": "text_completion"},
                "created": {"type": "integer"},
                "model": {"type": "string"},
                "choices": {"type": "array", "items": _CHOICE},
                "usage": _USAGE,
            }
        ),
        "ModelList": _object(
            {
                "object": {"const": "list"},
                "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
            }
        ),
        "Model": _MODEL,
        "Health": _object({"status": {"type": "string"}}),
        "Error": _object({"error": _ERROR}),
    }
    security: dict[str, Any] = {}
    components: dict[str, Any] = {"schemas": schemas}
    if has_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        security["security"] = [{"key": []}]
    return {
        "openapi": "3.1.0",
        "info": {"title": "gpt_2_simple", "version": version},
        "paths": paths,
        "components": components,
        **security,
    }


def _completion_request(models: Mapping[str, int], max_choices: int) -> dict[str, Any]:
    fields = fields_of(CompletionSettings)
    properties = {name: _parameter(field) for name, field in fields.items()}
    properties["model"]["enum"] = list(models)
    properties["max_tokens"]["maximum"] = max(models.values()) - 1  # a prompt has a token at least
    for name in ("n", "best_of"):
        properties[name]["maximum"] = max_choices
    return {
        "type": "object",
        "required": [name for name, f in fields.items() if f.default is dataclasses.MISSING],
        "properties": properties | {k: dict(v) for k, v in STRUCTURED_PARAMETERS.items()},
        "additionalProperties": False,
    }


def _parameter(field: Field) -> dict[str, Any]:
    setting = field.setting
    kind = next(_JSON_TYPES[kind] for kind in field.kinds if kind in _JSON_TYPES)
    is_required = field.default is dataclasses.MISSING
    schema: dict[str, Any] = {
        "description": setting.python_help,
        "type": kind if is_required else [kind, "null"],
    }
    limits = {
        "minimum": setting.special[0] if setting.special else setting.at_least,
        "maximum": setting.at_most,
        "exclusiveMinimum": setting.above,
    }
    if setting.special:
        schema["not"] = {"const": 0}  # between the special -1 and the range's 1
    schema |= {name: limit for name, limit in limits.items() if limit is not None}
    return schema if is_required else schema | {"default": field.default}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


_NUMBERS = {"type": "array", "items": {"type": ["number", "null"]}}
_CHOICE = _object(
    {
        "index": {"type": "integer"},
        "text": {"type": "string"},
        "finish_reason": {"enum": ["stop", "length"]},
        "logprobs": {
            "anyOf": [
                {"type": "null"},
                _object(
                    {
                        "tokens": {"type": "array", "items": {"type": "string"}},
                        "token_logprobs": _NUMBERS,
                        "top_logprobs": {"type": "array", "items": {"type": ["object", "null"]}},
                        "text_offset": {"type": "array", "items": {"type": "integer"}},
                    }
                ),
            ]
        },
    }
)
_USAGE = _object(
    {name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
)
_MODEL = _object(
    {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "max_model_len": {"type": "integer"},
    }
)
_ERROR = _object(
    {
        "message": {"type": "string"},
        "type": {"type": "string"},
        "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]},
    }
)


def _json(schema: str, description: str) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{schema}"}
    return {"description": description, "content": {"application/json": {"schema": reference}}}


def _errors(*statuses: int) -> dict[str, Any]:
    return {str(status): _json("Error", "What is wrong") for status in statuses}


def _get(summary: str, schema: str, *errors: int) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": _json(schema, summary), **_errors(*errors)}}


def _completions() -> dict[str, Any]:
    answer = _json("Completion", "The texts; with stream=true, pieces of them")
    answer["content"]["text/event-stream"] = {}  # pieces of a Completion, then "[DONE]"
    return {
        "summary": "Continue a text",
        "requestBody": {"required": True, **_json("CompletionRequest", "What to write")},
        "responses": {
            "200": answer,
            **_errors(400, 401, 403, 404, 408, 413, 429, 500, 503),
        },
    }
