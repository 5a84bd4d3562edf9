"""Values remembered for functions: found for the very same ones, forgotten with them."""

import gc

from pyro_vae.pair.state import Remembered


class Pair:
    def model(self):
        pass

    def guide(self):
        pass


def test_a_bound_method_is_known_by_its_function_and_instance():
    remembered, first, second = Remembered(), Pair(), Pair()
    remembered.keep("first", first.model, first.guide)
    assert remembered.get(first.model, first.guide) == "first"
    assert remembered.get(first.guide, first.model) is None
    assert remembered.get(first.model) is None
    assert remembered.get(second.model, second.guide) is None
    remembered.keep("again", first.model, first.guide)
    assert list(remembered.values()) == ["again"]


def test_a_value_is_forgotten_with_the_first_of_its_functions():
    remembered, pair = Remembered(), Pair()

    def guide():
        pass

    remembered.keep("value", pair.model, guide)
    remembered.keep("other", guide)
    del pair
    gc.collect()
    assert list(remembered.values()) == ["other"]


def test_what_takes_no_weak_reference_is_kept():
    remembered = Remembered()
    numbers, equal = (tuple(range(2)) for _ in range(2))
    remembered.keep("value", len, numbers)
    assert remembered.get(len, numbers) == "value"
    assert remembered.get(len, equal) is None


def test_another_object_at_the_same_place_is_not_taken_for_the_dead_one():
    remembered, pair = Remembered(), Pair()
    remembered.keep("value", pair.model)
    (key,) = remembered._entries
    references, value = remembered._entries[key]
    remembered._entries[key] = ([references[0], lambda: object()], value)
    assert remembered.get(pair.model) is None
