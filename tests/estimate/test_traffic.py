"""Bytes and seconds of collectives against closed forms."""

import dataclasses

import pytest

from latte_scale.config import load_config
from latte_scale.estimate.hardware import DEVICES, Cluster, device_like, find_device
from latte_scale.estimate.timing import transfers
from latte_scale.estimate.traffic import REACHED, Collective, transfer_s
from tests.conftest import ROOT

H100 = DEVICES["h100"]


def span(count, stride=1):
    return Cluster(H100, 1024).ranks(count, stride)


def test_a_rank_alone_sends_nothing():
    assert transfer_s("all_reduce", span(1), 1e9) == 0.0


@pytest.mark.parametrize(("kind", "ways"), [("all_gather", 1), ("reduce_scatter", 1), ("all_reduce", 2)])
def test_large_transfers_take_the_bytes_over_the_bus(kind, ways):
    """A ring of 8 moves 7/8 of the tensor past each rank, twice for an all-reduce; latency is nothing beside 100 GB."""
    expected = ways * 7 / 8 * 1e11 / (H100.link_bytes_per_s * REACHED)
    assert transfer_s(kind, span(8), 1e11) == pytest.approx(expected, rel=0.02)
    sent = Collective("x", kind, span(8), 1e11, 3, "nothing").sent_bytes
    assert sent == pytest.approx(3 * ways * 7 / 8 * 1e11)


def test_between_nodes_the_adapters_of_all_its_ranks_carry_a_ring_and_a_lone_rank_has_one():
    assert span(64).bus_bytes_per_s == 8 * H100.network_bytes_per_s
    assert span(8, stride=8).bus_bytes_per_s == H100.network_bytes_per_s
    assert span(8, stride=8).num_nodes == 8 and span(8).num_nodes == 1


def test_small_transfers_wait_for_every_hop_of_the_ring():
    assert transfer_s("all_gather", span(1024), 1e3) > 10 * transfer_s("all_gather", span(64), 1e3)


def test_devices_are_found_by_name_and_by_what_torch_calls_them():
    assert find_device("H100") is H100
    assert device_like("NVIDIA H100 80GB HBM3") is H100
    assert device_like("NVIDIA H200") is DEVICES["h200"]
    assert device_like("NVIDIA A100-SXM4-40GB") is DEVICES["a100-40"]
    assert device_like("NVIDIA GeForce RTX 4090") is DEVICES["rtx4090"]
    assert device_like("Radeon") is None
    assert find_device("h100", 4) == dataclasses.replace(H100, per_node=4)
    with pytest.raises(ValueError, match="a100"):
        find_device("h1000")


def test_ranks_of_a_clip_move_half_as_much_when_a_token_holds_two_frames():
    base = ["engine.kind=fsdp2", "engine.sequence_parallel=2"]
    moved = []
    for size in (1, 2):
        config = load_config(ROOT / "configs/ffs.yaml", [*base, f"model.tubelet_size={size}"])
        kinds = transfers(config, Cluster(DEVICES["h100"], 2), 1, 2)
        moved.append(next(kind.size_bytes for kind in kinds if kind.name == "move tokens of clips"))
    assert moved == [4 * 2 * 16 * 16 * 16 * 1152, 4 * 2 * 8 * 16 * 16 * 1152]
