"""When packets arrive, which never do, and what they count for: by arithmetic, without a clock."""

import struct

import pytest

from bench.forwarder import VNET_HEADER, Counters, LineModel, LineSpec, wire_size

MBIT_S = 125_000.0  # bytes


def arrivals(model: LineModel, sizes: list[int], now_s: float = 0.0) -> list[float | None]:
    return [model.offer(size, 1, now_s) for size in sizes]


def test_packets_follow_one_another_at_the_rate_and_arrive_after_the_delay() -> None:
    model = LineModel(LineSpec(MBIT_S, delay_s=0.1, queue_bytes=10_000))
    assert arrivals(model, [1250, 1250, 2500]) == pytest.approx([0.11, 0.12, 0.14])


def test_a_line_that_was_idle_owes_nothing() -> None:
    model = LineModel(LineSpec(MBIT_S, delay_s=0.0, queue_bytes=10_000))
    assert model.offer(1250, 1, 0.0) == 0.01
    assert model.offer(1250, 1, 5.0) == 5.01


def test_the_queue_is_bounded_and_drops_what_comes_last() -> None:
    model = LineModel(LineSpec(MBIT_S, delay_s=1.0, queue_bytes=3000))
    found = arrivals(model, [1500] * 10)
    assert [arrival is not None for arrival in found] == [True] * 2 + [False] * 8
    assert model.counters == Counters(bytes=3000, packets=2, lost=0, dropped=8)
    assert model.offer(1500, 1, 0.013) is not None  # one of them has left by then


def test_without_a_rate_everything_arrives_after_the_delay() -> None:
    model = LineModel(LineSpec(0.0, delay_s=0.02, queue_bytes=1_000_000))
    assert arrivals(model, [60_000] * 1000) == [0.02] * 1000


def test_losses_are_those_of_the_seed_and_take_their_time_on_the_line() -> None:
    def lost(seed: int) -> list[int]:
        model = LineModel(LineSpec(MBIT_S, 0.0, 10**9, loss=0.01, seed=seed))
        found = [number for number, one in enumerate(arrivals(model, [1000] * 10_000)) if one is None]
        assert model.counters == Counters(bytes=10_000_000, packets=10_000, lost=len(found), dropped=0)
        return found

    assert lost(1) == lost(1)
    assert lost(1) != lost(2)
    assert 50 < len(lost(1)) < 150


def packet(payload: int, segment: int = 0) -> bytes:
    """IPv4 and TCP headers of 20 and 32 bytes, as a TUN device gives them."""
    tcp = struct.pack("!HHIIBBHHH", 1, 2, 0, 0, 8 << 4, 0, 0, 0, 0) + bytes(12)
    return VNET_HEADER.pack(1, 1 if segment else 0, 52, segment, 20, 16) + bytes(20) + tcp + bytes(payload)


def test_every_segment_of_an_offloaded_packet_pays_for_its_headers() -> None:
    assert wire_size(packet(1000)) == (1052, 1)
    assert wire_size(packet(1448, segment=1448)) == (1500, 1)
    assert wire_size(packet(10 * 1448 + 1, segment=1448)) == (10 * 1500 + 53, 11)
