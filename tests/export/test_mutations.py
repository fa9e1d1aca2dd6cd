"""Twenty changes of one field that change what transformers computes; `make test-mutations` tries six times as many."""

from mutate_configs import RECIPES, mutate


def test_a_changed_field_is_the_same_model_or_a_refusal():
    outcomes = mutate(20, seed=7, recipes=RECIPES[:1])
    assert outcomes["equal"] >= 5
    assert outcomes["refused"] >= 5
    assert outcomes["equal"] + outcomes["refused"] == 20
