"""The pages for people: `/` asks the model and takes corrections, `/docs` lists the routes.

They load nothing from elsewhere, and run no script but their own.
"""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response

from visionloop.serving.body import RequestError

FOLDER = Path(__file__).parent
KEEPS = ('data-keeps-images="no"', 'data-keeps-images="yes"')
KINDS = {".css": "text/css", ".js": "text/javascript"}
NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; connect-src 'self'"
HOME_POLICY = (
    f"{NOTHING}; script-src 'self'; style-src 'self'; img-src blob: data:; media-src blob:;"
    " require-trusted-types-for 'script'"
)


def add_page(app: FastAPI, *, keeps_images: bool = False) -> None:
    """Add the pages and their files. `keeps_images`: the server keeps some; the page says so."""
    files = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir() if path.suffix in KINDS}
    home_page, docs_page = ((FOLDER / name).read_text(encoding="utf-8") for name in ("home.html", "docs.html"))
    if keeps_images:
        home_page = home_page.replace(*KEEPS)
    docs_policy = _make_policy(docs_page)

    @app.get("/", include_in_schema=False)
    async def home() -> HTMLResponse:
        return HTMLResponse(home_page, headers={"Content-Security-Policy": HOME_POLICY, "Cache-Control": "no-cache"})

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in files:
            raise RequestError("there is no such file", status=404, reason_code="not_found")
        kind = KINDS[Path(name).suffix]
        return Response(files[name], media_type=kind, headers={"Cache-Control": "no-cache"})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page, headers={"Content-Security-Policy": docs_policy})


def _make_policy(page: str) -> str:
    """Return the Content-Security-Policy of a page: its own script and style run, and no others."""
    allowed = {}
    for tag in ("script", "style"):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digest = hashlib.sha256((text[1] if text else "").encode()).digest()
        allowed[tag] = f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'"
    return f"{NOTHING}; img-src data:; {allowed['script']}; {allowed['style']}"
