"""Parameters and multiply-accumulates, against the papers and the authors' published networks."""

import pytest

from tfaccel.architectures import (
    NIN,
    VGG11,
    VGG13,
    VGG16,
    VGG19,
    GoogLeNet,
    MobileNetV1,
    MobileNetV2,
    MobileNetV3Large,
    MobileNetV3Small,
    ShuffleNetV1,
    ShuffleNetV2,
    SqueezeNet,
)
from tfaccel.measurement import count

# Exact: the paper's or the authors' network, for the MobileNets keras.applications' (batch-norm
# statistics included), for VGG torchvision's.
PARAMETERS = [
    (NIN, {}, 966_986),
    (NIN, {"input_shape": (224, 224, 3), "classes": 1000}, 7_595_176),
    (VGG11, {}, 132_863_336),
    (VGG13, {}, 133_047_848),
    (VGG16, {}, 138_357_544),
    (VGG19, {}, 143_667_240),
    (GoogLeNet, {}, 6_998_552),
    (GoogLeNet, {"auxiliary": True}, 13_378_280),
    (SqueezeNet, {"version": "1.0"}, 1_248_424),
    (SqueezeNet, {"version": "1.1"}, 1_235_496),
    (MobileNetV1, {}, 4_253_864),
    (MobileNetV2, {}, 3_538_984),
    (MobileNetV3Small, {}, 2_554_968),
    (MobileNetV3Large, {}, 5_507_432),
]
TRAINABLE = [
    (ShuffleNetV2, {"width": 0.5}, 1_366_792),
    (ShuffleNetV2, {"width": 1.0}, 2_278_604),
    (ShuffleNetV2, {"width": 1.5}, 3_503_624),
    (ShuffleNetV2, {"width": 2.0}, 7_393_996),
]
# The papers' figures, in millions.
MACS = [
    (VGG16, {}, 15_470),
    (MobileNetV1, {"width": 1.0}, 569),
    (MobileNetV1, {"width": 0.75}, 325),
    (MobileNetV1, {"width": 0.5}, 149),
    (MobileNetV1, {"width": 0.25}, 41),
    (MobileNetV2, {}, 300),
    (MobileNetV3Small, {}, 56),
    (MobileNetV3Large, {}, 219),
    (ShuffleNetV1, {"groups": 1}, 143),
    (ShuffleNetV1, {"groups": 2}, 140),
    (ShuffleNetV1, {"groups": 3}, 137),
    (ShuffleNetV1, {"groups": 4}, 133),
    (ShuffleNetV1, {"groups": 8}, 137),
    (ShuffleNetV1, {"groups": 3, "width": 0.5}, 38),
    (ShuffleNetV2, {"width": 0.5}, 41),
    (ShuffleNetV2, {"width": 1.0}, 146),
    (ShuffleNetV2, {"width": 1.5}, 299),
    (ShuffleNetV2, {"width": 2.0}, 591),
]


def called(value):
    if isinstance(value, dict):
        return ",".join(f"{key}={x}" for key, x in value.items()) or "published"
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("build", "arguments", "parameters"), PARAMETERS, ids=called)
def test_parameters_are_the_published(build, arguments, parameters):
    assert count(build(**arguments)).parameters == parameters


@pytest.mark.parametrize(("build", "arguments", "parameters"), TRAINABLE, ids=called)
def test_trainable_parameters_are_the_published(build, arguments, parameters):
    assert count(build(**arguments)).trainable_parameters == parameters


@pytest.mark.parametrize(("build", "arguments", "millions"), MACS, ids=called)
def test_macs_are_the_published(build, arguments, millions):
    assert count(build(**arguments)).macs == pytest.approx(millions * 1e6, rel=0.02)


def test_vgg16_macs_by_hand():
    sides, repeats, channels = (224, 112, 56, 28, 14), (2, 2, 3, 3, 3), (64, 128, 256, 512, 512)
    total, before = 0, 3
    for side, times, after in zip(sides, repeats, channels, strict=True):
        for _ in range(times):
            total += side * side * 9 * before * after
            before = after
    total += 7 * 7 * 512 * 4096 + 4096 * 4096 + 4096 * 1000
    assert count(VGG16()).macs == total
