"""The child of `sora.runtime.predictor.Smoke`: loads a model as the server would and runs its golden clips."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sora.core.processes import Emit, child_main
from sora.core.records import Recipe
from sora.runtime.predictor import Predictor, prepare_backend


def body(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """`{"model_file", "recipe", "version"}` → `{"difference", "seconds"}`; raises what `Predictor` does."""
    start = time.perf_counter()
    predictor = Predictor(Path(job["model_file"]), Recipe.from_dict(job["recipe"]), job["version"])
    return {"difference": predictor.check_golden(), "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    prepare_backend()  # while it waits for its job
    child_main(body)
