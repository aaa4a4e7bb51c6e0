"""Keyed numbers: a function of the place and the key alone, and as good as drawn."""

import torch

from manyviews.system.keyed_random import numpy_generator, seed_of, send, torch_generator, uniform
from pretend_cuda import pretend_cuda

EXPECTED = [956768, 6195876, 12287414, 16093271]


def test_a_number_depends_on_its_place_and_its_key_alone() -> None:
    places = torch.arange(1000)
    torch.manual_seed(1)
    before, found = torch.random.get_rng_state(), uniform(places, 3, 5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(uniform(places.view(10, 100).T, 3, 5), found.view(10, 100).T)
    assert torch.equal(uniform(places[17:18], 3, 5), found[17:18])
    for key in ((5, 3), (3, 6), (3,), (3, 5, 0)):
        assert not torch.equal(uniform(places, *key), found)


def test_the_numbers_are_the_same_in_every_version() -> None:
    assert (uniform(torch.tensor([0, 1, 2**40, -1]), 3, 5) * 2**24).int().tolist() == EXPECTED


def test_seeds_and_what_generators_draw_are_the_same_in_every_version() -> None:
    before = torch.random.get_rng_state()
    assert seed_of("0 3 1 2") == 4720051937992106651
    drawn = torch.randint(1 << 30, (3,), generator=torch_generator(3, 5))
    assert drawn.tolist() == [148204524, 1035276739, 707334523]
    assert numpy_generator("order", 3, 5).permutation(8).tolist() == [7, 4, 6, 0, 2, 5, 3, 1]
    assert numpy_generator("class", 3, 5).permutation(8).tolist() != [7, 4, 6, 0, 2, 5, 3, 1]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_numbers_are_uniform_and_independent_of_their_neighbours() -> None:
    found = uniform(torch.arange(1 << 16), 0).double()
    assert 0 <= found.min() < 1e-4
    assert 1 - 1e-4 < found.max() < 1
    assert (torch.histc(found, 64, 0, 1) - 1024).abs().max() < 5 * 32
    for other in (found[1:], uniform(torch.arange(1, 1 << 16), 1).double()):
        pair = torch.stack([found[:-1], other])
        assert torch.corrcoef(pair)[0, 1].abs() < 5 / 256


def test_what_is_sent_to_a_gpu_arrives_without_a_wait() -> None:
    drawn = torch.arange(7)
    assert send(drawn, torch.device("cpu")) is drawn
    with pretend_cuda() as log:
        sent = send(drawn, torch.device("cuda", 0))
        assert not log.waits
        assert sent.device.type == "cuda"
        assert torch.equal(sent.cpu(), drawn)
