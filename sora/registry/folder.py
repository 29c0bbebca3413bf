"""The folder of a registered model: what `mlflow.keras.save_model` would write, and the recipe.

Written without Keras and without MLflow, so the process that registers needs neither. `mlflow.keras.load_model` and
MLflow's pages read it. Layout: `MLmodel`, `data/model.keras`, `data/keras_module.txt`,
`requirements.txt`, `python_env.yaml`, `conda.yaml`, `recipe.json`. There is no `custom_objects.cloudpickle`: nothing
in it can run code when it is loaded with safe mode.
"""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from sora.core.records import Recipe

MODEL_FILE = "data/model.keras"
RECIPE_FILE = "recipe.json"
_PACKAGES = ("keras", "tensorflow", "numpy", "mlflow", "sora-video")


def recipe_bytes(recipe: Recipe) -> bytes:
    """The recipe as it is stored; the version's tag holds its sha256."""
    return json.dumps(recipe.to_dict(), ensure_ascii=False, sort_keys=True, indent=1).encode()


def digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write(folder: Path, model_file: Path, recipe: Recipe, *, model_id: str, run_id: str) -> None:
    """Writes everything but the model itself into `folder` (the model is sent from its own place)."""
    (folder / "data").mkdir(parents=True)
    python = platform.python_version()
    packages = [f"{name}=={_version(name)}" for name in _PACKAGES if _version(name)]
    texts = {
        "MLmodel": yaml.safe_dump(_mlmodel(model_file, recipe, model_id, run_id), sort_keys=False, allow_unicode=True),
        "data/keras_module.txt": "keras",
        "requirements.txt": "\n".join(packages) + "\n",
        "python_env.yaml": yaml.safe_dump(
            {
                "python": platform.python_version(),
                "build_dependencies": ["pip"],
                "dependencies": ["-r requirements.txt"],
            }
        ),
        "conda.yaml": yaml.safe_dump(
            {
                "name": "sora",
                "channels": ["conda-forge"],
                "dependencies": [f"python={python}", "pip", {"pip": packages}],
            }
        ),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / RECIPE_FILE).write_bytes(recipe_bytes(recipe))


def _mlmodel(model_file: Path, recipe: Recipe, model_id: str, run_id: str) -> dict[str, Any]:
    clip = recipe.clip
    return {
        "artifact_path": "model",
        "flavors": {
            "keras": {
                "data": "data",
                "keras_backend": os.environ.get("KERAS_BACKEND", "tensorflow"),
                "keras_version": _version("keras"),
                "save_exported_model": False,
            },
            "python_function": {
                "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
                "loader_module": "mlflow.keras",
                "python_version": platform.python_version(),
            },
        },
        "metadata": {"recipe": recipe.to_dict()},
        "mlflow_version": _version("mlflow"),
        "model_id": model_id,
        "model_size_bytes": model_file.stat().st_size,
        "model_uuid": model_id,
        "run_id": run_id,
        "signature": {
            "inputs": _tensor("uint8", (-1, clip.frames, clip.height, clip.width, 3)),
            "outputs": _tensor("float32", (-1, len(recipe.classes))),
            "params": None,
        },
        "utc_time_created": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S.%f}",
    }


def _tensor(dtype: str, shape: tuple[int, ...]) -> str:
    return json.dumps([{"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": list(shape)}}])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
