"""Micro-batches: how a batch is shared out, and which stage works on which part when.

All stages do the forward passes of a batch, then all backward passes (GPipe, Huang et al. 2019).
With S stages and M micro-batches each half takes M + S - 1 beats, in M of which a stage has work.
"""

import numpy as np

from tfaccel.distributed.arguments import check_count


def expected_bubble(stages: int, micro_batches: int) -> float:
    """Share of its time that a stage waits, if all stages are equally fast (Huang et al. 2019).

    Args:
        stages: S, from 1.
        micro_batches: M, from 1.

    Returns:
        (S - 1) / (M + S - 1), 0 to 1.

    >>> expected_bubble(4, 9)
    0.25
    """
    check_count("stages", stages)
    check_count("micro_batches", micro_batches)
    return (stages - 1) / (micro_batches + stages - 1)


def beats(stages: int, micro_batches: int) -> list[dict[int, int]]:
    """Returns the forward half of a step, beat by beat: {stage: micro-batch it works on}.

    The backward half is the same with the stages counted from the last.

    >>> beats(2, 2)
    [{0: 0}, {0: 1, 1: 0}, {1: 1}]
    """
    return [
        {stage: beat - stage for stage in range(stages) if 0 <= beat - stage < micro_batches}
        for beat in range(stages + micro_batches - 1)
    ]


def share_out(samples: int, replicas: int, micro_batches: int) -> list[list[slice]]:
    """Returns which samples of a batch each replica works on, micro-batch by micro-batch.

    Args:
        samples: of the batch, at least one for each replica.
        replicas: pipelines that share the batch.
        micro_batches: wanted for each; there are fewer, and as many on all, if samples are few.

    Returns:
        [replica][micro-batch], neighbours side by side, no two of lengths more than one apart
        within a replica.

    Raises:
        ValueError: there are fewer samples than replicas.

    >>> share_out(5, 1, 2)
    [[slice(0, 3, None), slice(3, 5, None)]]
    """
    if samples < replicas:
        raise ValueError(
            f"A batch of {samples} samples cannot be shared by {replicas} pipelines. Take another "
            "batch size, or leave out the last batch of the data."
        )
    shares = []
    for share in np.array_split(np.arange(samples), replicas):
        parts = np.array_split(share, min(micro_batches, samples // replicas))
        shares.append([slice(int(part[0]), int(part[-1]) + 1) for part in parts])
    return shares
