import io
import json

import keras
import numpy as np
import pytest
from rich.console import Console

from tfaccel.distributed.compression_costs import COSTS, CompressionCost, sparse_bits
from tfaccel.distributed.compressors import compressors
from tfaccel.distributed.cost_model import Network
from tfaccel.distributed.plan_report import describe_crossovers, make_plan_table, plan_to_dict
from tfaccel.distributed.planner import Planner
from tfaccel.distributed.step_time import gradient_shapes, measure_step

FAST = Network(bandwidth_mbit=8_000_000, latency_ms=0.001, add_ns=0)
SLOW = Network(bandwidth_mbit=100, latency_ms=0.1)
VALUES = 5_000_000


def two_compressors(**changes):
    """Dense, and one byte for 64 values that all have to be gathered, free of work."""
    small = CompressionCost("small", 0.125, False, **changes)
    return {"none": COSTS["none"], "small": small}


def test_a_step_is_compute_and_compression_and_communication():
    found = Planner(50.0, VALUES, SLOW).predict("ring", "none", 4)
    # 2 · 3/4 · 20 MB at 100 Mbit/s are 2.4 s; six latencies; 3/4 of 5 M additions of half a ns.
    assert found.communication_ms == pytest.approx(2400 + 0.6 + 1.875)
    assert found.step_ms == pytest.approx(50 + found.communication_ms)
    assert found.efficiency == pytest.approx(50 / found.step_ms)
    assert found.sent_bytes == pytest.approx(2 * 3 / 4 * 4 * VALUES)


def test_gathered_messages_are_all_read():
    costs = two_compressors(work_ns=2.0, read_ns=0.5)
    found = Planner(50.0, VALUES, SLOW, compressors=costs).predict("ring", "small", 4)
    assert found.compression_ms == pytest.approx(VALUES * (2.0 + 4 * 0.5) / 1e6)
    assert found.sent_bytes == 3 * VALUES / 64


def test_one_worker_does_nothing_but_compute():
    assert Planner(50.0, VALUES, SLOW).predict("ring", "dgc", 1).step_ms == 50.0


def test_dense_and_gathered_cross_where_their_bytes_do():
    """2(N-1)/N · 32 bits against (N-1) · 1/8 bit: equal at N = 2 · 32 · 8 = 512 workers."""
    network = Network(bandwidth_mbit=1, latency_ms=0.0, add_ns=0)
    planner = Planner(1.0, VALUES, network, compressors=two_compressors())
    changes = [c for c in planner.crossovers(1024) if c.what == "ring"]
    assert [(c.workers, c.before, c.after) for c in changes] == [(513, "small", "none")]


def test_ring_and_tree_cross_where_latency_outweighs_bytes():
    """With no latency to speak of the ring is never slower; with no bytes others are from 3 on."""
    dense = {"none": COSTS["none"]}
    wide = Planner(1.0, VALUES, Network(1, 1e-9, add_ns=0), compressors=dense)
    quick = Planner(1.0, 1, Network(1e9, 1.0, add_ns=0), compressors=dense)
    changes = {
        name: [(c.workers, c.before, c.after) for c in planner.crossovers(64)]
        for name, planner in (("wide", wide), ("quick", quick))
    }
    assert changes["wide"] == []
    # Two workers take two latencies in any topology, and the server with any number.
    assert changes["quick"] == [(3, "ring", "server")]
    assert quick.predict("ring", "none", 4).communication_ms == pytest.approx(6, rel=1e-3)
    assert quick.predict("tree", "none", 4).communication_ms == pytest.approx(4, rel=1e-3)


def test_sparse_compressors_take_the_ring_of_all_where_that_sends_less():
    planner = Planner(50.0, VALUES, SLOW)
    dense = planner.predict("ring", "none", 8192).sent_bytes
    assert planner.predict("ring", "dgc", 8192).sent_bytes == dense
    assert planner.predict("ring", "dgc", 2).sent_bytes < dense / 1000
    # Others gather on: 8,191 messages of a hundredth, each value with its place.
    assert planner.predict("ring", "topk", 8192).sent_bytes > 20 * dense


def test_messages_of_compressors():
    shapes = [(100, 200), (200,)]
    sizes = {name: cost.traffic(shapes).message_bytes for name, cost in COSTS.items()}
    assert sizes["none"] == 4 * 20_200
    assert sizes["bf16"] == 2 * 20_200
    assert sizes["efsignsgd"] == 20_200 / 8
    # Rank 2: P is 100 x 2, Q is 200 x 2, and the bias goes whole (Vogels et al. 2019).
    assert sizes["powersgd"] == 4 * (2 * (100 + 200) + 200)
    # Half of all places: one bit says which. All values at 32 bits would be dense.
    assert sparse_bits(0.5, 0) == 1.0
    assert sizes["dgc"] < sizes["randomk"] < sizes["topk"] < sizes["efsignsgd"] < sizes["int8"]


def test_what_compressors_say_of_themselves():
    """The messages that tfaccel's own compressors make, for matrices of random gradients."""
    random = np.random.default_rng(0)
    gradients = [keras.ops.convert_to_tensor(random.normal(size=(512, 512)), "float32")] * 2
    shapes = [tuple(gradient.shape) for gradient in gradients]
    assert set(COSTS) == set(compressors.names()) - {"threshold"}
    for name, cost in COSTS.items():
        channel = Counting()
        compressor = compressors.get(name)
        payload, state = compressor.compress(gradients, compressor.init(shapes), channel)
        compressor.communicate(payload, state, channel)
        expected = cost.traffic(shapes)
        assert channel.bytes == pytest.approx(expected.message_bytes, rel=0.15), name
        assert channel.gathers is not expected.summable, name


class Counting:
    """A channel of two ranks that counts the bytes it is given."""

    rank, size = 0, 2

    def __init__(self):
        self.bytes, self.gathers = 0, False

    def mean(self, tensor, key):
        self.bytes += tensor.numpy().nbytes
        return tensor

    mean_half = mean

    def gather(self, message, key):
        self.gathers = True
        self.bytes += message.numpy().nbytes
        return keras.ops.concatenate([message, message])


def test_a_model_says_its_gradients_and_its_time():
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(3), keras.layers.BatchNormalization()]
    )
    model.layers[0].bias.trainable = True
    before = model.get_weights()
    assert gradient_shapes(model) == [(5, 3), (3,), (3,), (3,)]
    assert measure_step(model, 4) > 0
    assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))
    assert Planner(1.0, gradient_shapes(model), FAST).values == 24


def test_a_plan_is_printed_and_becomes_json():
    planner = Planner(50.0, VALUES, SLOW, compressors=two_compressors())
    predictions, crossovers = planner.table([2, 1024]), planner.crossovers(1024)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(make_plan_table(predictions))
    text = console.export_text()
    assert "1024" in text
    # 50 ms, 20 MB at 100 Mbit/s, two latencies, half of the additions: by the ring of two.
    assert f"{50 + 1600 + 0.2 + 1.25:,.0f}" in text
    assert text.count("ring") == 2
    words = describe_crossovers(crossovers, 1024)
    assert "none is faster than small from" in words
    assert describe_crossovers([], 64) == "The fastest way is the same from 2 to 64 workers."
    content = json.loads(json.dumps(plan_to_dict(planner, predictions, crossovers)))
    assert content["values"] == VALUES
    assert len(content["predictions"]) == 2 * 3 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5), "compute_ms must be above 0"),
        ((1.0, 0), "shapes must be an int from 1"),
        ((1.0, 5, SLOW, 0), "servers must be an int from 1"),
    ],
)
def test_figures_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Planner(*arguments, *([SLOW] if len(arguments) < 3 else []))
    with pytest.raises(ValueError, match=r"compressor must be one of none, fp16.*got 'zip'"):
        Planner(1.0, 5, SLOW).predict("ring", "zip", 2)
