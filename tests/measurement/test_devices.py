import platform
from pathlib import Path

from tfaccel.measurement import describe_device, devices


def test_description_names_processor_cores_and_versions():
    import keras

    text = describe_device()
    assert text.startswith(devices.processor())
    assert f"{devices.usable_cores()} cores" in text
    assert f"Python {platform.python_version()}" in text
    assert f"Keras {keras.__version__}" in text
    assert "LiteRT " in text
    assert "\n" not in text


def test_processor_where_the_system_does_not_say(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "processor : 0\nmodel name :\n")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert devices.processor() == "riscv64"


def test_processor_from_the_system(monkeypatch):
    monkeypatch.setattr(
        Path, "read_text", lambda *_, **__: "processor : 0\nmodel name : Quick 9000\n"
    )
    assert devices.processor() == "Quick 9000"
