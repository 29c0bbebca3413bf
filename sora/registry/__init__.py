"""All of MLflow: runs, metrics, models, the aliases `champion` and `previous`. Nothing else in Sora speaks to it.

registry = Registry(tracking_uri, name)
run_id = registry.start_run("nightly")
registry.log_metrics(run_id, {"loss": 0.3}, step=1)
version = registry.register(run_id, Path("model.keras"), recipe, report, data_version)
registry.promote(version, cache=folder, smoke=try_it, reason="better by 3 points")
"""

from sora.registry.history import Move
from sora.registry.registry import Registry, champion_over_rest, fetch_over_rest
from sora.registry.rest import NotFound, Unreachable
from sora.registry.versions import ChampionRef

__all__ = ["ChampionRef", "Move", "NotFound", "Registry", "Unreachable", "champion_over_rest", "fetch_over_rest"]
