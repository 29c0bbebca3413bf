"""The same decoding and model behind LitServe: `python -m benchmarks.serving.litserve MODEL RECIPE PORT WORKERS`.

As its documentation has it: batches of up to 8, each worker process with a model of its own, uploads as form files.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import litserve
import numpy as np

from sora.core.records import Recipe
from sora.core.tensors import VIDEO, Clips


class Api(litserve.LitAPI):  # type: ignore[misc]  # LitServe has no types
    def setup(self, device: str) -> None:
        from sora.runtime.predictor import Predictor

        self.recipe = Recipe.from_dict(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
        self.predictor = Predictor(Path(sys.argv[1]), self.recipe, 1)

    # LitServe takes an annotation for a schema of the body.
    def decode_request(self, request) -> np.ndarray:  # type: ignore[no-untyped-def]
        from sora.media.video.transform import prepare_clips

        with tempfile.NamedTemporaryFile() as file:
            file.write(request["file"].file.read())
            file.flush()
            clip: np.ndarray = prepare_clips(Path(file.name), self.recipe.clip)[0]
            return clip

    def predict(self, clips: np.ndarray) -> list[Any]:
        return list(self.predictor.probabilities(Clips({VIDEO: np.asarray(clips)})))

    def encode_response(self, probabilities: np.ndarray) -> dict[str, Any]:
        answer = self.predictor.answer(probabilities[None])
        return {**answer.to_dict(), "data_version": "", "filename": ""}


if __name__ == "__main__":
    api = Api(max_batch_size=8, batch_timeout=0.005, api_path="/v1/predict")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(sys.argv[4]))
    server.run(host="127.0.0.1", port=int(sys.argv[3]), log_level="warning", generate_client_file=False)
