"""Settings without their secrets, for whatever leaves the project's folder: MLflow's parameters and artifacts,
parameters of Prefect's flow runs, messages.

The webhook (chat services put the token into the path) and user and password in an address are secret.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import yaml

REMOVED = "removed"
_ADDRESSES = ("prefect_api_url", "mlflow_tracking_uri")  # of the section `services`
_URL = re.compile(r"https?://[^\s'\"#,\[\]{}]+")


def without_login(url: str) -> str:
    """An address without user and password."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.rsplit("@", 1)[-1]
    if "@" not in parts.netloc:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.rsplit("@", 1)[1]))


def params(values: Mapping[str, Any], *, webhook: str | None = REMOVED) -> dict[str, Any]:
    """`Settings.to_dict()` with `webhook` in place of a webhook, and addresses without user and password."""
    result = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    alert, services = result.get("alert"), result.get("services")
    if isinstance(alert, dict) and alert.get("webhook"):
        alert["webhook"] = webhook
    if isinstance(services, dict):
        services.update({name: without_login(str(services[name])) for name in _ADDRESSES if services.get(name)})
    return result


def params_text(text: str) -> str:
    """The text of a params.yaml without its secrets; everything else, including comments, stays as it is.

    The webhook becomes `null`, so that the settings are still valid. Any other address, as in a comment, keeps only its
    host, except those of `services`, which keep all but user and password. A text that is not YAML is not params:
    nothing of it is kept. One in a form too complex for this loses its comments.
    """
    try:
        values = yaml.safe_load(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return ""
    wanted = params(values, webhook=None) if isinstance(values, Mapping) else values
    redacted = _replaced(text, root)
    try:
        done = yaml.safe_load(redacted) == wanted
    except yaml.YAMLError:
        done = False
    return redacted if done else yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True)


def _replaced(text: str, root: yaml.Node | None) -> str:
    spans = sorted(_secrets(root), reverse=True)
    for start, end, value in spans:
        text = text[:start] + value + text[end:]
    kept = {value for _, _, value in spans}
    return _URL.sub(lambda match: match[0] if match[0] in kept else _host(match[0]), text)


def _secrets(root: yaml.Node | None) -> Iterator[tuple[int, int, str]]:
    """(start, end, what to put there) of each value in the text that is or may hold a secret."""
    for section, name, value in _values(root):
        if value.tag == "tag:yaml.org,2002:null":
            continue
        span = value.start_mark.index, value.end_mark.index
        if (section, name) == ("alert", "webhook"):
            yield *span, "null"
        elif section == "services" and name in _ADDRESSES and isinstance(value, yaml.ScalarNode):
            yield *span, without_login(value.value)


def _values(root: yaml.Node | None) -> Iterator[tuple[str, str, yaml.Node]]:
    """(section, key, value) of a mapping of mappings."""
    if not isinstance(root, yaml.MappingNode):
        return
    for section, mapping in root.value:
        if isinstance(section, yaml.ScalarNode) and isinstance(mapping, yaml.MappingNode):
            for key, value in mapping.value:
                if isinstance(key, yaml.ScalarNode):
                    yield section.value, key.value, value


def _host(url: str) -> str:
    try:
        parts = urlsplit(url)
        host = parts.hostname or REMOVED
    except ValueError:
        return REMOVED
    return f"{parts.scheme}://{host}" if parts.path in ("", "/") and not parts.query else f"{parts.scheme}://{host}/…"
