"""torchrun and the deepspeed launcher over two hosts that share nothing but a bridge and a disk: the same arguments."""

import pytest

from tests.integration.test_engines_agree import largest_difference
from tests.slurm.launchers import as_ranks, deepspeed, elastic, start_on, static, wait_for


@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        (static, ("engine.kind=fsdp2",)),
        (elastic, ("engine.kind=fsdp2",)),
        (deepspeed, ("engine.kind=zero", "engine.zero_stage=3")),
    ],
    ids=["torchrun-static-fsdp2", "torchrun-elastic-fsdp2", "deepspeed-zero3"],
)
def test_two_hosts_do_what_one_process_does(two_hosts, data_sets, tmp_path, reference, launcher, engine):
    run, _ = wait_for(start_on(two_hosts, tmp_path, data_sets.latents, launcher, *engine), tmp_path)
    assert run.code == 0, run.output
    assert run.digests == [record["sample_ids_sha"] for record in reference]
    assert largest_difference(run.metrics, reference) < 1e-5


def test_a_loopback_address_is_refused_on_both_hosts(two_hosts, data_sets, tmp_path):
    """As two separate machines would see it: each has a 127.0.0.1 of its own."""
    started = start_on(two_hosts, tmp_path, data_sets.latents, as_ranks("127.0.0.1"), "engine.kind=fsdp2")
    run, outputs = wait_for(started, tmp_path)
    assert run.code == 78
    for name, output in zip(two_hosts.names, outputs, strict=True):
        assert f"MASTER_ADDR 127.0.0.1 is the loopback address of {name} itself" in output, output
