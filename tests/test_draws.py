import torch

from dit_ops.draws import Draws


def test_a_draw_depends_on_seed_counters_and_name_only():
    a = Draws(7).at(3, 1)
    first = a.normal("noise", (4,))
    a.normal("other", (100,))
    assert torch.equal(first, Draws(7, (3, 1)).normal("noise", (4,)))
    different = [Draws(8).at(3, 1), Draws(7).at(1, 3), Draws(7).at(31), Draws(7).at(3)]
    assert all(not torch.equal(first, d.normal("noise", (4,))) for d in different)
    assert not torch.equal(first, a.normal("noise 2", (4,)))


def test_torch_global_state_is_untouched():
    before = torch.random.get_rng_state()
    Draws(0).uniform("u", (3,))
    assert torch.equal(before, torch.random.get_rng_state())


def test_distributions():
    d = Draws(0)
    integers = d.integers("i", 2, 5, (1000,))
    assert integers.unique().tolist() == [2, 3, 4]
    assert d.uniform("u", (1000,)).min() >= 0 and d.uniform("u", (1000,)).max() < 1
    assert sorted(d.permutation("p", 10)) == list(range(10))
    assert abs(d.normal("n", (10000,)).std() - 1) < 0.05


def test_an_update_s_draws_are_the_same_for_all_its_micro_batches():
    update = Draws(7).at(3, 1)
    draw = lambda draws: draws.integers("exit_step", 0, 1000, (4,)).tolist()
    assert draw(update.at(0).of_update()) == draw(update.at(5).of_update()) == draw(update)
    others = [Draws(7).at(4, 1, 0), Draws(7).at(3, 0, 0), Draws(8).at(3, 1, 0)]
    assert draw(update) not in [draw(other.of_update()) for other in others]
    assert update.key("a") == Draws(7, (3, 1)).key("a") != update.key("b")
