"""Numbers are read one step late, and a loss spike is reported once."""

import numpy as np
import torch

from latte_scale.run import readback


def test_readback_hands_out_steps_in_order():
    late = readback.Readback()
    numbers = torch.tensor([1.0, 2.0], dtype=torch.float64)
    late.push(7, numbers)
    numbers.zero_()  # the next step reuses its buffers
    late.push(8, numbers)
    assert len(late) == 2
    assert late.pop() == (7, [1.0, 2.0])
    assert late.pop() == (8, [0.0, 0.0])


def test_a_spike_is_told_once_and_ordinary_noise_never():
    detector = readback.SpikeDetector()
    noise = np.random.default_rng(1).lognormal(mean=-1.0, sigma=0.2, size=5000)
    assert [detector.look(loss) for loss in noise] == [None] * 5000
    assert detector.look(20.0) > 8
    assert detector.look(21.0) is None  # still the same spike
    assert detector.look(0.4) is None and detector.look(float("nan")) is None
    assert detector.look(20.0) > 8


def test_a_run_that_got_worse_for_good_is_told_once():
    detector = readback.SpikeDetector()
    verdicts = [detector.look(0.5 + 0.01 * (step % 7) + (step >= 100)) for step in range(400)]
    assert [step for step, verdict in enumerate(verdicts) if verdict] == [100]


def test_few_losses_are_not_judged():
    detector = readback.SpikeDetector()
    assert [detector.look(loss) for loss in [1.0] * 10 + [100.0]] == [None] * 11
