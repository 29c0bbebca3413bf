"""What serving is measured against: `python -m benchmarks.serving.bare MODEL RECIPE FILE` decodes one file and calls
the warmed model on its clips, over and over, with no server around it.

It says `ready`, then waits for lines on standard input: `requests N` or `seconds S`. Each gets one line of JSON, the
seconds that each turn took.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from sora.core.records import Recipe
from sora.media.video.transform import clips_and_rate
from sora.runtime.predictor import Predictor


def main() -> None:
    model, recipe_file, video = (Path(name) for name in sys.argv[1:4])
    recipe = Recipe.from_dict(json.loads(recipe_file.read_text(encoding="utf-8")))
    predictor = Predictor(model, recipe, 1)

    def turn() -> float:
        start = time.perf_counter()
        predictor.probabilities(clips_and_rate(video, recipe.clip)[0])
        return time.perf_counter() - start

    for _ in range(20):
        turn()
    print("ready", flush=True)
    for line in sys.stdin:
        what, amount = line.split()
        spent: list[float] = []
        end = time.perf_counter() + float(amount)
        while len(spent) < int(amount) if what == "requests" else time.perf_counter() < end:
            spent.append(turn())
        print(json.dumps(spent), flush=True)


if __name__ == "__main__":
    main()
