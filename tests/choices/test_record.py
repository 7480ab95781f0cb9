"""What rank 0 chooses, or why it cannot, reaches all ranks."""

import pytest

from latte_scale.choices.record import rank_0_chooses
from latte_scale.engine import Ranks
from tests.bench.test_subjects import CPU


class Told(Ranks):
    """One of two ranks in turn: rank 0 tells, rank 1 is told."""

    said: object = None

    def broadcast_object(self, obj: object, src: int = 0) -> object:
        if self.rank == src:
            Told.said = obj
        return Told.said


FIRST, SECOND = Told(0, 2, 0, CPU), Told(1, 2, 1, CPU)


def refuse() -> str:
    raise AssertionError("only rank 0 chooses")


def test_all_ranks_get_the_choice_of_rank_0():
    assert [rank_0_chooses(FIRST, lambda: "sdpa"), rank_0_chooses(SECOND, refuse)] == ["sdpa", "sdpa"]


@pytest.mark.parametrize(
    ("raised", "elsewhere"), [(ValueError("no JSON"), ValueError), (OSError("no space left"), RuntimeError)]
)
def test_no_rank_waits_for_a_choice_that_could_not_be_made(raised, elsewhere):
    """Else the others would wait in the broadcast until the launcher ends them. ValueError is exit code 78."""

    def fail() -> str:
        raise raised

    with pytest.raises(type(raised), match=str(raised)):
        rank_0_chooses(FIRST, fail)
    with pytest.raises(elsewhere, match=f"rank 0: {raised}") as caught:
        rank_0_chooses(SECOND, refuse)
    assert isinstance(caught.value, ValueError) == isinstance(raised, ValueError)
