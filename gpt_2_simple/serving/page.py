"""The page to write with: its file in, an answer with a strict policy out."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re

from starlette.responses import Response


def page_response(in_frames: bool) -> Response:
    """The page. `in_frames`: whether other pages, such as a notebook, may show it in a frame."""
    html = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _digest_of("script", html),
        "style-src": _digest_of("style", html),
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "*" if in_frames else "'none'",
    }
    text = "; ".join(f"{name} {value}" for name, value in policy.items())
    return Response(html, media_type="text/html", headers={"content-security-policy": text})


def _digest_of(tag: str, html: str) -> str:
    """What a policy calls the page's own script or style sheet: nothing else may run."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
