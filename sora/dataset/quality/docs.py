"""Data Docs: the result of validation as web pages.

`index.html` is the summary with every rejected video; `videos.html` and `classes.html` are Great Expectations' own
pages of the two suites. Those load styles and scripts from half a dozen addresses, trust every name that they print,
and link to pages of a site that does not exist; here they get their own style, escaped names and a policy that lets
them fetch and run nothing.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import numpy as np

from sora.core.files import atomic, writing
from sora.core.records import Rejection
from sora.dataset.quality.rules import FIXES
from sora.dataset.quality.validation import Judgement, ValidationReport

_HERE = Path(__file__).parent
_MOST_ROWS = 2000  # rejected videos shown per rule
_MOST_UNEXPECTED = 100  # rows shown per expectation on Great Expectations' pages
_POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
)


def write(folder: Path, judgement: Judgement) -> None:
    """Writes the pages of a judgement, `index.html` last. Other files stay.

    Raises:
        DiskFull, ServiceError: they can't be written.
    """
    pages = {f"{result.suite_name}.html": _suite_page(result) for result in judgement.results}
    pages["index.html"] = _summary(judgement.report, {name: name in pages for name in ("videos.html", "classes.html")})
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for stale in {"videos.html", "classes.html", "index.html"} - pages.keys():
            (folder / stale).unlink(missing_ok=True)
    for name, text in pages.items():
        with atomic(folder / name) as file:
            file.write(text.encode("utf-8", "backslashreplace"))


def _summary(report: ValidationReport, pages: dict[str, bool]) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    by_rule: dict[str, list[Rejection]] = {}
    for rejection in report.rejected:
        by_rule.setdefault(rejection.rule, []).append(rejection)
    return environment.from_string((_HERE / "docs.html.j2").read_text(encoding="utf-8")).render(
        report=report,
        stops=report.findings("stop"),
        warnings=report.findings("warn"),
        rejected=sorted(by_rule.items(), key=lambda item: (-len(item[1]), item[0])),
        most=_MOST_ROWS,
        fixes=FIXES,
        largest=max(report.counts.values(), default=0),
        pages=pages,
    )


def _suite_page(result: Any) -> str:
    """Great Expectations' own page of a result, safe to open anywhere."""
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    for one in result.results:
        one.result = _shown({key: value for key, value in one.result.items() if key != "unexpected_index_query"})
        # The suite shares the configuration: only the printed parts are replaced, on a copy.
        one.expectation_config.kwargs = _shown(one.expectation_config.kwargs)
    view: Any = DefaultJinjaPageView()
    page: str = view.render(ValidationResultsPageRenderer().render(result))
    page = re.sub(r"<script\b.*?</script>|<link\b[^>]*>|<img\b[^>]*>|<footer\b.*?</footer>", "", page, flags=re.S)
    page = re.sub(r"\burl\([^)]*\)", "none", page)
    page = re.sub(r'href="[^"#]*index\.html"', 'href="index.html"', page)
    page = re.sub(r'<a\s+href="[^"#]*expectations/[^"]*"\s*>(.*?)</a>', r"\1", page, flags=re.S)
    page = page.replace("<br> Data asset: None", "")
    # Foldable parts open through their address, without a script: #name is the element's id.
    page = re.sub(r'<a data-toggle="collapse"', "<a", page)
    page = re.sub(r"<div id=([^\s\"'>]+) class=", r'<div id="\1" class=', page)
    style = (_HERE / "docs.css").read_text(encoding="utf-8")
    title = f"Sora · rules about {result.suite_name}"
    page = re.sub(r"<title>.*?</title>", "", page, flags=re.S)
    return page.replace("<head>", f"<head>\n    {_POLICY}\n    <title>{title}</title>", 1).replace(
        "</head>", f"<style>\n{style}</style>\n  </head>", 1
    )


def _shown(value: Any) -> Any:
    """A value as Great Expectations' templates can print it: plain numbers, escaped text, lists of readable length."""
    if isinstance(value, str):
        return html.escape(value).replace("$", "&#36;")  # they substitute $names
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: _shown(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(entry) for entry in value[:_MOST_UNEXPECTED]]
    return value
