import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfaccel.distributed.micro_batches import beats, expected_bubble, share_out

COUNTS = st.integers(1, 6)


@given(stages=COUNTS, micro_batches=st.integers(1, 9))
def test_every_stage_does_every_micro_batch_in_order_and_after_the_stage_before(
    stages, micro_batches
):
    done = [[] for _ in range(stages)]
    timetable = beats(stages, micro_batches)
    for work in timetable:
        for stage, number in work.items():
            if stage:
                assert number in done[stage - 1]
        for stage, number in work.items():
            done[stage].append(number)
    assert done == [list(range(micro_batches))] * stages
    # Idle places of the timetable are the paper's bubble.
    idle = 1 - sum(len(work) for work in timetable) / (stages * len(timetable))
    assert idle == pytest.approx(expected_bubble(stages, micro_batches))


@given(samples=st.integers(1, 50), replicas=COUNTS, micro_batches=st.integers(1, 9))
def test_every_sample_is_worked_on_once(samples, replicas, micro_batches):
    if samples < replicas:
        with pytest.raises(ValueError, match=f"{samples} samples cannot be shared by {replicas}"):
            share_out(samples, replicas, micro_batches)
        return
    shares = share_out(samples, replicas, micro_batches)
    flat = [i for parts in shares for part in parts for i in range(samples)[part]]
    assert flat == list(range(samples))
    lengths = [[part.stop - part.start for part in parts] for parts in shares]
    assert {len(parts) for parts in lengths} == {min(micro_batches, samples // replicas)}
    assert all(max(parts) - min(parts) <= 1 for parts in lengths)
    assert min(map(min, lengths)) > 0
