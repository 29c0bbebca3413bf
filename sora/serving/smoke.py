"""The smoke test that follows a move of the champion: does the version load and answer as its recipe promises?

`smoke` runs it in a child process, so that the caller (the flow, `sora promote`) never imports TensorFlow.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sora.errors import PromotionFailed, ServiceError
from sora.processes import child_main, run_child
from sora.records import Recipe


def smoke(model_file: Path, recipe: Recipe, version: int = 0) -> dict[str, Any]:
    """Loads the model as the server would and lets it answer its golden clips: `{"difference": float, "seconds"}`.

    Raises:
        PromotionFailed: it does not load, its digest differs, or its answers do.
    """
    job = {"model_file": str(model_file), "recipe": recipe.to_dict(), "version": version}
    try:
        return run_child("sora.serving.smoke", job)
    except ServiceError as error:
        raise PromotionFailed(f"the smoke test failed: {error.message}", mend=error.mend) from error


def _body(job: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    import time

    from sora.serving.predictor import Predictor

    start = time.perf_counter()
    predictor = Predictor(Path(job["model_file"]), Recipe.from_dict(job["recipe"]), job["version"])
    return {"difference": predictor.check_golden(), "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    child_main(_body)
