"""A model in words and figures, for `sora model describe`: levels, shapes, parameters, FLOPs, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sora.config import PRESETS, Clip, Model, Settings
from sora.core.errors import InputError
from sora.core.processes import without_noise

if TYPE_CHECKING:
    import keras


def of_preset(name: str) -> Settings:
    """Settings with the preset's model and the clips that it was made for.

    Raises:
        InputError: there is no such preset.
    """
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}", fix=f"choose one of {', '.join(PRESETS)}")
    return Settings(model=Model(preset=name), clip=Clip(**PRESETS[name].clip.to_dict()))


def describe(settings: Settings, *, classes: int | None = None, batch: int | None = None) -> dict[str, Any]:
    """Builds the model of the settings and counts its cost.

    Arguments:
        classes: None: those of the settings, or 2 if they name none.
        batch: batch size of the memory estimate; None: `train.batch`.

    Returns {"preset", "settings", "clip": [frames, height, width, 3], "classes", "parameters", "flops" (a clip),
    "memory" (see `cost.memory`), "layers": [{"name", "output": [shape a clip], "parameters", "flops"}]}. Names of a
    network's parts are "low/stem", "low/level 1", …; a level's output is its maps, before they are averaged.

    Raises:
        InputError: a binary head for a number of classes other than 2.
    """
    config, classes = settings.model, classes or len(settings.classes) or 2
    try:
        with without_noise():  # its libraries print at import and at the first weights
            from sora.model import classifier, cost

            model = classifier.build(config, settings.clip.spec(), classes)
    except ValueError as error:
        raise InputError(str(error), fix="correct the section `model` of params.yaml, or --classes") from error
    return {
        "preset": config.preset,
        "settings": config.model_dump(mode="json", exclude={"preset"}),
        "clip": list(model.input_shape[1:]),
        "classes": classes,
        "parameters": cost.parameters(model),
        "flops": cost.flops(model),
        "memory": cost.memory(model, batch or settings.train.batch),
        "layers": [row for layer in model.layers for row in _rows(layer)],
    }


def _rows(layer: keras.layers.Layer) -> list[dict[str, Any]]:
    import keras

    from sora.model import backbone, streams

    if isinstance(layer, keras.layers.Dropout | keras.layers.InputLayer):
        return []
    if isinstance(layer, backbone.BackboneStream):
        return [
            _row(f"{layer.name}/level {number}", part[-1].compute_output_shape(_built_for(part[-1]))[1:], part)
            for number, part in enumerate(layer.parts(), 1)
        ]
    if not isinstance(layer, streams.ResidualStream):
        return [_row(layer.name, layer.output.shape[1:], [layer])]
    rows = []
    stem = layer.stem.compute_output_shape(_built_for(layer.stem))
    rows.append(_row(f"{layer.name}/stem", stem[1:], [layer.stem]))
    for level in range(len(layer.filters)):
        blocks = layer.levels[level * layer.blocks : (level + 1) * layer.blocks]
        output = blocks[-1].compute_output_shape(_built_for(blocks[-1]))
        rows.append(_row(f"{layer.name}/level {level + 1}", output[1:], blocks))
    return rows


def _built_for(layer: keras.layers.Layer) -> Any:
    return layer.get_build_config()["input_shape"]


def _row(name: str, output: Any, layers: list[keras.layers.Layer]) -> dict[str, Any]:
    from sora.model import cost

    return {
        "name": name,
        "output": list(output),
        "parameters": sum(cost.parameters(layer) for layer in layers),
        "flops": sum(cost.flops(layer) for layer in layers),
    }


def draw(model: dict[str, Any]) -> str:
    """The text for the result of `describe`."""
    head = model["settings"]["head"]
    lines = [f"{model['preset']}: clips of {_size(model['clip'])}, {model['classes']} classes, head {head}", ""]
    table: list[tuple[str, ...]] = [("", "output", "parameters", "MFLOP")]
    streams = {"motion": "low", "key_frames": "high"}
    for row in model["layers"]:
        name, _, part = row["name"].rpartition("/")
        if row["name"] in streams:
            label = f"┌ clip → {row['name'].replace('_', ' ')}"
        elif name in streams.values():
            label = f"│ {name} {part}" + (" ─▶ one vector per frame" if part.startswith("level") else "")
        elif row["name"].startswith("lateral"):
            label = f"├ low ─▶ high: {row['name'].replace('_', ' ')}"
        else:
            label = f"▼ {row['name']}"
        figures = [f"{row[key] / scale:,.{digits}f}" if row[key] else "" for key, scale, digits in _FIGURES]
        table.append((label, _size(row["output"]), *figures))
    widths = [max(len(cells[column]) for cells in table) for column in range(4)]
    lines += [
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in table
    ]
    memory = model["memory"]
    shares = ", ".join(f"{name} {_megabytes(memory[name])}" for name in ("weights", "optimizer", "activations"))
    return "\n".join(
        [
            *lines,
            "",
            f"{model['parameters']:,} parameters · {model['flops'] / 1e9:.3f} GFLOP per clip (2 per multiply-add)",
            f"training at batch {memory['batch']}: about {_megabytes(memory['total'])} ({shares})",
        ]
    )


_FIGURES = (("parameters", 1, 0), ("flops", 1e6, 1))


def _size(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
