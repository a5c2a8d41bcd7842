"""Which part of a training is over, by the loaders that it goes through."""

from cce_torchrec.swap.epochs import Epochs


def late(epochs: Epochs, fraction: float, steps: range) -> list[int]:
    return [step for step in steps if epochs.is_late(step, fraction)]


def test_each_epoch_may_be_the_last() -> None:
    epochs = Epochs(None)
    epochs.begin(10, 0)
    assert late(epochs, 0.8, range(1, 10)) == [9]
    epochs.begin(10, 10)  # step 10 is heard of when the second epoch has begun
    assert late(epochs, 0.8, range(10, 20)) == [10, 19]


def test_a_number_of_epochs() -> None:
    epochs = Epochs(3)
    epochs.begin(10, 0)
    epochs.begin(10, 10)
    assert late(epochs, 0.5, range(10, 21)) == [16, 17, 18, 19, 20]


def test_loaders_that_do_not_say() -> None:
    """The second epoch is taken to be as long as the first was."""
    epochs = Epochs(None)
    assert not epochs.is_late(5, 0.5)
    epochs.begin(None, 0)
    assert not epochs.is_known
    assert late(epochs, 0.5, range(1, 20)) == []
    epochs.begin(None, 8)
    assert epochs.is_known
    assert late(epochs, 0.5, range(9, 16)) == [13, 14, 15]
