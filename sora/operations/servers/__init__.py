"""The project's Prefect and MLflow servers: used if they are up, started if not, ended with their starter.

State (databases, artifacts, ports, logs) lies below `.sora/`. Both ask for the project's secret, on loopback too
(`sora.config.credentials`), and answer neither foreign pages nor foreign names (`sora.core.doorkeeper`).
"""

from sora.operations.servers.access import Addresses, environment, login, mlflow_address, own_login
from sora.operations.servers.describe import LOOPBACK, Server, mlflow_server, prefect_environment, prefect_server
from sora.operations.servers.process import (
    START_SECONDS,
    RunningServer,
    free_port,
    log_file,
    log_tail,
    reachable,
    run_logged,
    spawn,
    start,
    started,
    stop,
    wait_ready,
)
from sora.operations.servers.recorded import Running, asked_by, forget, record, running
from sora.operations.servers.share import servers

__all__ = [
    "LOOPBACK",
    "START_SECONDS",
    "Addresses",
    "Running",
    "RunningServer",
    "Server",
    "asked_by",
    "environment",
    "forget",
    "free_port",
    "log_file",
    "log_tail",
    "login",
    "mlflow_address",
    "mlflow_server",
    "own_login",
    "prefect_environment",
    "prefect_server",
    "reachable",
    "record",
    "run_logged",
    "running",
    "servers",
    "spawn",
    "start",
    "started",
    "stop",
    "wait_ready",
]
