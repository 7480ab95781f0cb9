"""The soak: its short form runs, counts what it replaced, and sees each process."""

from benchmarks import loader_soak


def test_a_short_soak_is_flat_and_replaces_the_damaged_sample(tmp_path):
    loader_soak.make(tmp_path)
    points, num_replaced = loader_soak.soak(tmp_path, 400, 1)
    assert num_replaced >= 1  # the damaged sample comes once an epoch, of 300 batches
    assert {name for _, name, _, _ in points} == {"trainer", "worker 0"}
    own = [mb for _, name, mb, _ in points if name == "worker 0"]
    assert len(own) == 100 and own[0] > 20 and own[-1] < own[10] + 20
