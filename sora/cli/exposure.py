"""`sora up --host`: what servers need when other machines can reach them, so that nobody uses them without a login.

Prefect and MLflow ask for the project's secret (`.sora/secret`). On any address but loopback they ask for the
logins that these environment variables set:

    PREFECT_SERVER_API_AUTH_STRING   "user:password" of Prefect's API and pages
    MLFLOW_FLASK_SERVER_SECRET_KEY   signs MLflow's forms; any long random text
    MLFLOW_AUTH_ADMIN_PASSWORD       of MLflow's first user, `admin` or MLFLOW_AUTH_ADMIN_USERNAME

and the API needs SORA_API_TOKEN or a token of `sora token add`. MLflow answers only to its own names:
this machine's, the given address and private networks; MLFLOW_SERVER_ALLOWED_HOSTS replaces that list.
"""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec

from sora.config import Project
from sora.config.credentials import Login
from sora.core import doorkeeper
from sora.core.addresses import is_loopback
from sora.core.errors import InputError
from sora.core.files import writing
from sora.operations import servers as services
from sora.operations.servers import Server
from sora.serving.tokens import ENVIRONMENT, TokenFile

# What must be set when the address is not loopback, and what it is.
_SECRETS = {
    "PREFECT_SERVER_API_AUTH_STRING": "user:password for Prefect",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "a long random text for MLflow",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "the password of MLflow's user admin, at least 12 characters",
    ENVIRONMENT: "the API's bearer token; or `sora token add NAME`",
}


def client_logins(project: Project, host: str) -> dict[str, str]:
    """The environment of clients where the servers ask for more than the project's secret; empty on loopback.

    Raises:
        InputError: something is missing.
        ServiceError: the file of tokens is damaged.
    """
    if is_loopback(host):
        return {}
    missing = [f"{name} ({what})" for name, what in _SECRETS.items() if not os.environ.get(name)]
    if TokenFile(project.tokens).tokens():
        missing = [one for one in missing if not one.startswith(f"{ENVIRONMENT} ")]
    if missing:
        raise InputError(
            f"other machines can reach {host}, and these logins are not set: {', '.join(missing)}",
            fix="set these environment variables, or omit --host to stay on this machine",
        )
    if ":" not in os.environ["PREFECT_SERVER_API_AUTH_STRING"]:
        raise InputError("PREFECT_SERVER_API_AUTH_STRING has no colon", fix="use user:password")
    if len(os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]) < 12:
        raise InputError("MLFLOW_AUTH_ADMIN_PASSWORD has fewer than 12 characters", fix="use a longer one")
    if find_spec("flask_wtf") is None:
        raise InputError(
            "MLflow's authentication needs a package that is not installed", fix="pip install 'mlflow[auth]'"
        )
    user = os.environ.get("MLFLOW_AUTH_ADMIN_USERNAME", "admin")
    return {
        "PREFECT_API_AUTH_STRING": os.environ["PREFECT_SERVER_API_AUTH_STRING"],
        "MLFLOW_TRACKING_USERNAME": os.environ.get("MLFLOW_TRACKING_USERNAME", user),
        "MLFLOW_TRACKING_PASSWORD": os.environ.get(
            "MLFLOW_TRACKING_PASSWORD", os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]
        ),
    }


def prefect_server(project: Project, host: str, *, exposed: bool) -> Server:
    """Prefect with the nightly schedule; `exposed`: with the login from the environment."""
    if not exposed:
        return services.prefect_server(project, schedules=True)
    login = Login.parse(os.environ["PREFECT_SERVER_API_AUTH_STRING"])
    names = {doorkeeper.HOSTS: ",".join(_names(host))}
    return services.prefect_server(project, schedules=True, login=login, env=names)


def mlflow_server(project: Project, host: str, *, exposed: bool) -> Server:
    """MLflow; `exposed`: with accounts of its own."""
    return _mlflow_with_accounts(project, host) if exposed else services.mlflow_server(project)


def _mlflow_with_accounts(project: Project, host: str) -> Server:
    home = project.server_home("mlflow")
    config = home / "auth.ini"
    with writing(config):
        home.mkdir(parents=True, exist_ok=True)
        config.write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{home}/auth.db\nadmin_username = admin\n",
            encoding="utf-8",
        )
    private = ["10.*", "192.168.*", *(f"172.{second}.*" for second in range(16, 32))]
    env = {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_SERVER_ALLOWED_HOSTS": os.environ.get("MLFLOW_SERVER_ALLOWED_HOSTS")
        or ",".join(f"{name},{name}:*" for name in dict.fromkeys(["127.0.0.1", *_names(host), *private])),
    }
    return services.mlflow_server(project, app=("--factory", "mlflow.server.auth:create_app"), env=env)


def _names(host: str) -> list[str]:
    """Names by which others call servers on `host`; MLFLOW_SERVER_ALLOWED_HOSTS adds more, except patterns."""
    given = os.environ.get("MLFLOW_SERVER_ALLOWED_HOSTS", "").split(",")
    names = ["localhost", socket.gethostname(), socket.getfqdn(), host, *(name.strip() for name in given)]
    return list(dict.fromkeys(name for name in names if name and "*" not in name))
