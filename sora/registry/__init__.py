"""All of MLflow: runs, metrics, models, the aliases `champion` and `previous`. Nothing else in Sora talks to it.

registry = Registry(tracking_uri, name)
run_id = registry.runs.start_run("nightly")
registry.runs.log_metrics(run_id, {"loss": 0.3}, step=1)
version = registry.register(run_id, Path("model.keras"), recipe, report, data_version)
registry.promote(version, cache=folder, smoke=try_it, reason="better by 3 points")

`Registry` is composed of one part per subject, over one `rest.Rest`: `runs.Runs`, `judged.JudgedRuns`,
`model.RegisteredModel`, `versions.Versions` and `champion.Champion`. `RegistryPort` is what the nightly needs of it.
"""

from sora.registry.champion import Smoke
from sora.registry.history import Move, line
from sora.registry.judged import JudgedRun
from sora.registry.port import RegistryPort, RunsPort
from sora.registry.registry import Registry, champion_over_rest, fetch_over_rest
from sora.registry.rest import NotFound, Unreachable
from sora.registry.runs import RunStatus
from sora.registry.versions import ChampionRef

__all__ = [
    "ChampionRef",
    "JudgedRun",
    "Move",
    "NotFound",
    "Registry",
    "RegistryPort",
    "RunStatus",
    "RunsPort",
    "Smoke",
    "Unreachable",
    "champion_over_rest",
    "fetch_over_rest",
    "line",
]
