"""The README's Python runs as it stands, and its commands exist."""

import re
from pathlib import Path

import click
import keras
import numpy as np

import tfaccel
from tests.contracts.tables import convolutional, make_data, sequential
from tfaccel.cli import tfaccel as command
from tfaccel.measurement import count

README = Path(__file__).parent.parent / "README.md"
DISTILLATION = README.parent / "docs" / "distillation.md"
MIGRATION = README.parent / "docs" / "migrating_from_tfmot.md"


def blocks(page=README):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def run(code, model, **more):
    x, y = make_data(64)
    x_test, y_test = make_data(32, seed=1)
    names = {"model": model, "x": x, "y": y, "x_test": x_test, "y_test": y_test, **more}
    # Fewer steps than a user's data has, and a schedule as short; all else as it stands.
    code = code.replace("epochs=", "verbose=0, epochs=")
    code = code.replace("end_step=500", "end_step=4, frequency=2")
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    return names


def test_training_script_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run(blocks()[0], sequential())
    assert (tmp_path / "small.tflite").exists()
    assert "accuracy" in capsys.readouterr().out
    kernel = np.asarray(names["quantized"].get_layer("hidden").layer.kernel)
    assert (kernel == 0).sum() >= kernel.size // 2


def test_light_network_is_built_as_it_stands():
    assert run("import tfaccel\n" + blocks()[1], None)["model"].output_shape == (None, 5)


def test_rewriting_runs_as_it_stands(capsys):
    model = convolutional()
    plain = model.get_layer("stem_relu").output
    swish = keras.layers.Conv2D(8, 3, activation="swish", name="swish")(plain)
    pooled = keras.layers.GlobalAveragePooling2D(name="mean")(swish)
    model = keras.Model(model.inputs[0], keras.layers.Dense(4, name="logits")(pooled))
    names = run("import keras, tfaccel\n" + blocks()[2], model)
    assert count(names["light"]).macs <= 0.5 * count(names["folded"]).macs
    assert names["light"].get_layer("swish").activation is keras.activations.hard_swish
    assert "swish" in capsys.readouterr().out


def test_removing_channels_runs_as_it_stands(capsys):
    inputs = keras.Input(make_data(1)[0].shape[1:])
    x = keras.layers.Conv2D(32, 3, use_bias=False, name="first")(inputs)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    x = keras.layers.Conv2D(32, 3, activation="relu", name="second")(x)
    pooled = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(4, name="logits")(pooled))
    names = run("import keras, tfaccel\n" + blocks()[4], model)
    assert count(names["small"]).macs <= 0.5 * count(model).macs
    assert "'logits': \"an output of" in capsys.readouterr().out


def test_iterating_and_patterns_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("import keras, tfaccel\n" + blocks()[3], sequential())
    kernel = np.asarray(tfaccel.strip(names["pruned"]).get_layer("hidden").kernel) != 0
    rows = kernel.T.reshape(kernel.shape[1], -1, 4)
    assert (rows.sum(axis=2) == 2).all()
    ticket = tfaccel.strip(names["ticket"]).get_layer("hidden").kernel
    assert round(float((np.asarray(ticket) == 0).mean()), 2) == 0.2


def test_metapruning_runs_as_it_stands():
    names = run("import keras, tfaccel\n" + blocks()[5], sequential())
    light = names["light"]
    assert count(light).macs == names["found"].cost
    assert names["found"].cost <= 0.5 * names["space"].macs(names["space"].whole)


def shallow(width):
    inputs = keras.Input(make_data(1)[0].shape[1:])
    x = keras.layers.Conv2D(width, 3, activation="relu")(inputs)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(4, name="logits")(x))


def test_distilling_runs_as_it_stands():
    names = {"teacher": shallow(8), "student": shallow(4)}
    code = "".join(f"import {name}\n" for name in ("keras", "tfaccel")) + blocks()[6]
    names |= run(code, None, **names)
    assert names["small"] is names["student"]


def test_few_bits_run_as_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run("import keras, tfaccel\n" + blocks()[7], sequential())
    kernel = np.asarray(tfaccel.strip(names["shared"]).get_layer("hidden").kernel)
    assert len(np.unique(kernel)) <= 16
    assert capsys.readouterr().out
    packed = tfaccel.quantization.load_packed("binary.bin").predict(names["x_test"], verbose=0)
    np.testing.assert_allclose(names["predictions"], packed, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "int8.tflite").exists()
    assert len(blocks()) == 9  # each is run here


def test_training_on_several_workers_runs_as_it_stands_in_one_process():
    names = run("import keras, tfaccel\n" + blocks()[8], sequential())
    assert names["hvd"].size() == 1
    assert int(names["optimizer"].iterations) == 2


def test_migration_guide_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second, *_ = blocks(MIGRATION)  # the others run in tests/compat
    code = first.replace("end_step=500", "end_step=2, frequency=1")
    names = run("import keras\n" + code, sequential())
    kernel = np.asarray(names["small"].get_layer("hidden").kernel)
    assert round(float((kernel == 0).mean()), 2) == 0.8
    run("import keras\n" + second.replace("0.5, 1, 500", "0.5, 1, 2, frequency=1"), sequential())
    assert (tmp_path / "pruned.tflite").exists()


def test_guide_to_distillation_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = [re.sub(r"\bepochs=1", "verbose=0, epochs=1", text) for text in blocks(DISTILLATION)]
    x, y = make_data(64)
    x_test, y_test = make_data(32, seed=1)
    names = {"keras": keras, "tfaccel": tfaccel, "x": x, "y": y, "x_test": x_test, "y_test": y_test}
    for width, name in enumerate(("sibling", "student", "assistant", "other", "teacher"), 4):
        names[name] = shallow(width)
    names["texts"] = [
        "a good film by one of our best directors",
        "a bad film without any story to tell",
        "good and bad at the same time",
        "no other comedy makes you laugh so much",
    ]
    for number, text in enumerate(code):
        exec(compile(text, f"distillation.md, block {number}", "exec"), names)  # noqa: S102
    assert isinstance(names["small"], keras.Model)
    assert len(code) == 6
    assert names["more"].shape == (8, 12)


def test_guide_to_quantization_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks(DISTILLATION.parent / "quantization.md")
    assert len(found) == 3
    x, y = make_data(64)
    x_test, y_test = make_data(32, seed=1)
    names = {"keras": keras, "tfaccel": tfaccel, "x": x, "y": y, "model": sequential()}
    names |= {"x_test": x_test, "y_test": y_test}
    for number, text in enumerate(found):
        code = re.sub(r"\bepochs=", "verbose=0, epochs=", text)
        exec(compile(code, f"quantization.md, block {number}", "exec"), names)  # noqa: S102
    assert set(names["chosen"].bits.values()) <= {4, 8}
    assert (tmp_path / "noise.html").exists()


def test_guide_to_gradient_compression_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = blocks(DISTILLATION.parent / "gradient_compression.md")
    assert len(found) == 4
    x, y = make_data(64)
    names = {"x": x, "y": y, "model": sequential()}
    try:
        for number, text in enumerate(found):
            code = re.sub(r"\bepochs=", "verbose=0, epochs=", text)
            exec(compile(code, f"gradient_compression.md, block {number}", "exec"), names)  # noqa: S102
    finally:
        names["hvd"].shutdown()
    assert capsys.readouterr().out == "TopK\n"
    # Momentum is DGC's, alone too, and its state stands beside the plain model.
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"model-1.keras", "model-1.compression-0-of-1.npz"}


def test_guide_to_distributed_training_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks(DISTILLATION.parent / "distributed.md")
    assert len(found) == 5
    x, y = make_data(64)
    model = shallow(4)
    model = keras.Model(model.input, keras.layers.Softmax()(model.output))
    names = {"keras": keras, "x": x, "y": y, "model": model}
    for number, text in enumerate(found):
        code = text.replace(", callbacks=", ", verbose=0, callbacks=")
        code = code.replace("epochs=1, shuffle", "verbose=0, epochs=1, shuffle")
        exec(compile(code, f"distributed.md, block {number}", "exec"), names)  # noqa: S102
    try:
        assert (tmp_path / "best.keras").exists()
        assert names["state"].epoch == 2
        assert names["names"] == ["a", "b"]
        assert float(names["loss"]) > 0
    finally:
        names["hvd"].shutdown()


def test_guide_to_clusters_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipeline, server, planner = blocks(DISTILLATION.parent / "clusters.md")
    assert "ParameterServer(" in server  # tests/distributed/test_parameter_server.py runs it
    random = np.random.default_rng(0)
    names = {}
    for part in ("train", "test"):
        names[f"x_{part}"] = random.normal(size=(64, 16)).astype("float32")
        names[f"y_{part}"] = random.integers(0, 4, 64)
    code = pipeline.replace("epochs=2", "epochs=2, verbose=0")
    try:
        exec(compile(code, "clusters.md, pipeline", "exec"), names)  # noqa: S102
    finally:
        names["hvd"].shutdown()
    assert len(names["pipeline"].stages) == 2
    assert names["history"].history.keys() >= {"loss", "accuracy", "val_accuracy"}
    plain = keras.saving.load_model(tmp_path / "trained.keras").get_weights()
    assert all((a == b).all() for a, b in zip(plain, names["model"].get_weights(), strict=True))
    exec(compile(planner, "clusters.md, planner", "exec"), names)  # noqa: S102
    assert names["small"].step_ms < names["dense"].step_ms
    assert " from " in capsys.readouterr().out


def test_commands_exist_with_their_options():
    text = README.read_text(encoding="utf-8")
    for line in re.findall(r"^    tfaccel (.+?)(?:\s+#.*)?$", text, re.MULTILINE):
        name, *rest = line.split()
        sub = command.get_command(click.Context(command), name)
        assert sub is not None, name
        options = {option for parameter in sub.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= options
