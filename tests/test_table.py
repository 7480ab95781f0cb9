"""The printed table against the counts behind it, and the reason it gives."""

from latte_scale import table
from latte_scale.model.flops import num_flops
from latte_scale.model.latte_settings import preset


def test_every_size_in_every_variant(capsys) -> None:
    assert table.main(["--patch-size", "4"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| Latte-") == 16 and printed.count("| LatteT2V") == 2
    tera = f"{num_flops(preset('XL/4'), 16, 32, 32) / 1e12:.3f}"
    assert f"| Latte-XL/4 | interleaved | 28 | 673,847,552 | 1.0000 | {tera} | 1.000 |" in printed
    assert "| LatteT2V, 256 px | 1,057,246,880 | 8.141 |" in printed
    assert "of the work of Latte-XL/4" in printed


def test_parameters_agree_within_a_percent_and_parts_make_up_the_whole() -> None:
    rows = table.latte_rows(2)
    for row in rows:
        first = next(other for other in rows if other.name == row.name)
        assert abs(row.parameters / first.parameters - 1) < 0.01
        assert sum(row.flops) == row.flops.total


def test_halving_the_heads_moves_no_work() -> None:
    """The reason for which variant parallel is not a quarter: scores are all that is not parameters times tokens."""
    rows = {row.variant: row for row in table.latte_rows(2) if row.name == "Latte-XL/2"}
    assert rows["parallel"].flops == rows["interleaved"].flops
    scores = 28 * 2 * 4096 * 2 * (16 + 256) / 2 * 1152
    assert table.score_share(rows["interleaved"]) * rows["interleaved"].flops.total == scores
    assert table.score_share(rows["interleaved"]) < 0.02
