"""LSH attention position by position in numpy, from the paper's definitions."""

import numpy as np


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def hash_vectors(vectors, rotation):
    """h(x) = argmax([xR; -xR])."""
    rotated = vectors @ rotation
    return np.concatenate([rotated, -rotated], axis=-1).argmax(-1)


def found_by_round(buckets, size, *, causal, before=1, after=0, mask=None):
    """For each position, what one round lets it attend to, itself excepted."""
    time = len(buckets)
    known = np.ones(time, bool) if mask is None else mask
    kept = sorted((i for i in range(time) if known[i]), key=lambda i: (buckets[i], i))
    chunk = {i: place // size for place, i in enumerate(kept)}
    found = [[] for _ in range(time)]
    for i in kept:
        for j in kept:
            near = -after <= chunk[i] - chunk[j] <= before
            if near and i != j and buckets[i] == buckets[j] and (j < i or not causal):
                found[i].append(j)
    return found


def attend(query, value, rounds, *, correct_duplicates=True):
    """One head: softmax over what all rounds find; a position alone attends to itself.

    Args:
        query: [time, size].
        value: likewise.
        rounds: of each round, what each position finds.
        correct_duplicates: False counts what several rounds find several times.
    """
    keys = query / np.linalg.norm(query, axis=-1, keepdims=True)
    out = np.zeros_like(value)
    for i in range(len(query)):
        found = [j for one in rounds for j in one[i]]
        found = sorted(set(found)) if correct_duplicates else found
        found = found or [i]
        out[i] = softmax(keys[found] @ query[i]) @ value[found]
    return out


def run_layer(layer, x, rounds_of, **options):
    """What the layer should give, with `rounds_of(batch, query of one head)` for the rounds."""
    x = x.astype("float64")
    query = x @ np.asarray(layer.query_dense.kernel)
    value = x @ np.asarray(layer.value_dense.kernel)
    outputs = np.zeros_like(query)
    for sample in range(len(x)):
        for head in range(layer.heads):
            part = slice(head * layer.key_dim, (head + 1) * layer.key_dim)
            q, v = query[sample, :, part], value[sample, :, part]
            outputs[sample, :, part] = attend(q, v, rounds_of(sample, q), **options)
    return outputs @ np.asarray(layer.output_dense.kernel)
