"""The page `/docs`: asks the model from a browser, and lists the routes. It loads nothing from elsewhere."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, RedirectResponse

PAGE = Path(__file__).parent / "docs.html"


def add_page(app: FastAPI) -> None:
    """Add the page, and a redirect to it."""
    page = PAGE.read_text(encoding="utf-8")
    policy = _make_policy(page)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/", include_in_schema=False)
    async def home() -> RedirectResponse:
        return RedirectResponse("docs")


def _make_policy(page: str) -> str:
    """Return the Content-Security-Policy of a page: its own script and style run, and no others."""
    allowed = {}
    for tag in ("script", "style"):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digest = hashlib.sha256((text[1] if text else "").encode()).digest()
        allowed[tag] = f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'"
    others = "default-src 'none'; connect-src 'self'; img-src blob: data:; base-uri 'none'; form-action 'none'"
    return f"{others}; frame-ancestors 'none'; {allowed['script']}; {allowed['style']}"
