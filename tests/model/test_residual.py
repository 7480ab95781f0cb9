"""Residual layers in a row, by their formula; tests/model/kernels compares the kernels with it."""

import torch

from latte_scale.model.residual import Layer, Modulation, run_layers


def test_each_layer_reads_the_sum_before_it() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    of_square = Modulation(torch.tensor(0.5), torch.tensor(2.0), torch.tensor(-1.0))
    layers = [
        Layer(torch.square, of_square),  # with shift, scale and gate
        Layer(torch.sin, None, normed=False),  # reads x itself
        Layer(torch.exp, None),  # reads its norm
        Layer(torch.square, of_square),
    ]

    def norm(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, (8,), eps=1e-6)

    expected = [x - (norm(x) * 3 + 0.5) ** 2]
    expected.append(expected[-1] + expected[-1].sin())
    expected.append(expected[-1] + norm(expected[-1]).exp())
    expected.append(expected[-1] - (norm(expected[-1]) * 3 + 0.5) ** 2)
    for count, result in enumerate(expected, 1):
        torch.testing.assert_close(run_layers(x, layers[:count], "torch"), result)


def test_the_stream_keeps_its_dtype() -> None:
    x, row = torch.randn(2, 3, 8).bfloat16(), torch.ones(8)
    layers = [Layer(torch.Tensor.float, None), Layer(torch.Tensor.float, Modulation(row, row, row))]
    assert run_layers(x, layers, "torch").dtype == torch.bfloat16
