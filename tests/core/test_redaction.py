from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sora.config import Project, parse
from sora.core import redaction
from sora.dataset import versioning
from tests.servers import make_project

SECRET = "T0KEN-in-the-path"
HOOK = f"https://hooks.example/services/{SECRET}"


@pytest.mark.parametrize(
    ("url", "clean"),
    [
        ("http://host:5000", "http://host:5000"),
        ("http://ann:T0KEN@host:5000/api", "http://host:5000/api"),
        ("http://ann:p@T0KEN@host", "http://host"),
        ("http://T0KEN@[broken", "[broken"),
        ("no address", "no address"),
    ],
)
def test_an_address_without_its_login(url: str, clean: str) -> None:
    assert redaction.without_login(url) == clean


@pytest.mark.parametrize(
    "text",
    [
        f"name: one # mine\nalert:\n  webhook: {HOOK} # ours\ntrain: {{epochs: 3}}\n",
        f"name: one\nalert: {{webhook: '{HOOK}'}}\ntrain: {{epochs: 3}}\n",
        f'name: one\nalert: {{"webhook": "{HOOK}"}}\ntrain:\n  epochs: 3\n',
        f'{{"name": "one", "alert": {{"webhook": "{HOOK}"}}, "train": {{"epochs": 3}}}}',
        f"name: one\nalert:\n  webhook: >-\n    {HOOK}\ntrain: {{epochs: 3}}\n",
        f"name: one\nalert:\n  webhook: |\n    {HOOK}\ntrain: {{epochs: 3}}\n",
        'name: one\nalert:\n  webhook: "https://hooks.example/T0KEN-\\\n    in-the-path"\ntrain: {epochs: 3}\n',
        f"name: one\nalert: &a\n  webhook: {HOOK}\ntrain: {{epochs: 3}}\n",
        f"# webhook: {HOOK}\nname: one\n#alert: {{webhook: '{HOOK}'}}\ntrain: {{epochs: 3}}\n",
    ],
)
def test_a_webhook_does_not_leave_the_folder(text: str) -> None:
    found = redaction.params_text(text)
    assert SECRET not in found and "in-the-path" not in found
    settings = parse(found)
    assert settings.alert.webhook is None
    assert (settings.name, settings.train.epochs) == ("one", 3)


def test_addresses_of_servers_keep_all_but_the_login() -> None:
    text = f"services:\n  prefect_api_url: http://ann:{SECRET}@host:4200/api\n  mlflow_tracking_uri: 'http://m:5000'\n"
    services = parse(redaction.params_text(text)).services
    assert (services.prefect_api_url, services.mlflow_tracking_uri) == ("http://host:4200/api", "http://m:5000")


def test_everything_else_stays_as_it_is(repository: Path) -> None:
    for file in ("params.yaml", "sora/templates/params.yaml"):
        text = (repository / file).read_text(encoding="utf-8")
        assert redaction.params_text(text) == text
        filled = text.replace("webhook: null", f"webhook: {HOOK}")
        assert filled != text and redaction.params_text(filled) == text
    assert redaction.params_text("a: [") == ""
    assert redaction.params_text("") == ""


def test_parameters_that_are_logged() -> None:
    text = f"alert: {{webhook: '{HOOK}'}}\nservices: {{mlflow_tracking_uri: 'http://ann:{SECRET}@m:5000'}}\n"
    values = parse(text).to_dict()
    found = redaction.params(values)
    assert SECRET not in str(found) and SECRET in str(values)
    assert found["alert"]["webhook"] == "removed" and found["services"]["mlflow_tracking_uri"] == "http://m:5000"
    assert redaction.params(parse("").to_dict()) == parse("").to_dict()


def test_the_state_that_a_run_stores(tmp_path: Path) -> None:
    """What goes to MLflow, and as a parameter to a worker elsewhere."""
    project = make_project(tmp_path, f"name: tested\nalert:\n  webhook: {HOOK}\n")
    assert SECRET not in str(versioning.state(project))
    assert yaml.safe_load(versioning.state(project)["params.yaml"])["name"] == "tested"
    assert project.settings().alert.webhook == HOOK  # the project's own file is as it was
    assert isinstance(project, Project)
