"""What mkdocs does beside building docs/: pages link to files of the checkout, and so those become pages, too.

Links are written as they work in the checkout, ``../examples/plain_ddp.py``. Every file outside docs/ that a page
links to, or that the navigation names, gets a page under ``checkout/``: Markdown as it is, other files as code. A link
to a folder becomes text. A page that would fetch anything from somewhere else fails the build.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PLACE = "checkout/"
LINK = re.compile(r"(?P<text>!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^()\s#]+)(?P<anchor>#[^()\s]*)?\)")
PART = re.compile(
    rf"(?P<link>{LINK.pattern})|^(?P<fence>```+|~~~+).*?^(?P=fence)\s*$|`[^`\n]+`", re.MULTILINE | re.DOTALL
)
"""A link, whose text may be code, or code: a fence or a span."""
FETCHED = re.compile(
    r"""<(?:(?:script|img|iframe|source|video)\b[^>]*\bsrc|link\b[^>]*\bhref)=["']?(?:https?:)?//[^>]*>"""
)
SUFFIX = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".cfg": "ini", ".lock": "text", ".def": "text"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside docs/ that is linked to, also from such pages."""
    named = [PurePosixPath(uri).relative_to(PLACE) for uri in _named(config.nav) if uri.startswith(PLACE)]
    waiting = [str(path) for path in named]
    for file in files.documentation_pages():
        waiting += _outside(f"docs/{file.src_uri}", file.content_string)
    seen = set[str]()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        text = (ROOT / path).read_text()
        if path.endswith(".md"):
            waiting += _outside(path, text)
            files.append(File.generated(config, PLACE + path, content=text))
        else:
            code = f"# {path}\n\n~~~~~~{SUFFIX.get(Path(path).suffix, 'text')}\n{text}\n~~~~~~\n"
            files.append(File.generated(config, f"{PLACE}{path}.md", content=code))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links of the checkout into links of the site, and take the mark of tests off the fences."""
    here = _of_checkout(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        path = _path(here, match["target"])
        if path is None:
            return match[0]
        if (ROOT / path).is_dir():
            return match["text"].removeprefix("[").removesuffix("]")
        target = posixpath.relpath(_of_site(path), posixpath.dirname(page.file.src_uri) or ".")
        return f"{match['text']}({target}{match['anchor'] or ''})"

    if here.endswith(".md"):
        markdown = _in_links(markdown, lambda text: LINK.sub(rewritten, text))
    return re.sub(r"^( *```bash) not-run.*$", r"\1", markdown, flags=re.MULTILINE)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Refuse a page that fetches something from elsewhere."""
    found = [tag for tag in FETCHED.findall(output) if 'rel="canonical"' not in tag]
    if found:
        raise PluginError(f"{page.file.src_uri} fetches {found[0]}; everything a page shows lies in the site")
    return output


def _named(nav: Any) -> list[str]:
    """Files that the navigation names."""
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav or ()
    return [uri for entry in entries for uri in _named(entry)]


def _in_links(markdown: str, change: Callable[[str], str]) -> str:
    """Return the markdown with a change applied to its links, but not to code."""
    return PART.sub(lambda part: change(part[0]) if part["link"] else part[0], markdown)


def _outside(page: str, markdown: str) -> list[str]:
    """Files of the checkout outside docs/ that a page links to."""
    found: list[str | None] = []
    _in_links(markdown, lambda text: found.extend(_path(page, m["target"]) for m in LINK.finditer(text)) or text)
    return [path for path in found if path and not path.startswith("docs/") and (ROOT / path).is_file()]


def _path(page: str, target: str) -> str | None:
    """The file of the checkout that a link of a page means; None for an address and for what is not there."""
    if "://" in target or target.startswith("mailto:"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    return path if not path.startswith("..") and os.path.exists(ROOT / path) else None  # noqa: PTH110


def _of_checkout(uri: str) -> str:
    """The file of the checkout behind a page of the site; a page of code has no links of its own."""
    return uri.removeprefix(PLACE) if uri.startswith(PLACE) else f"docs/{uri}"


def _of_site(path: str) -> str:
    """The page, or the picture, of the site for a file of the checkout."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PLACE + path if path.endswith(".md") else f"{PLACE}{path}.md"
