"""The numbers behind the charts: thinning loses nothing visible."""

from pathlib import Path

from latte_scale.reporting.charts import MAX_POINTS, _points, _value, all_charts
from latte_scale.reporting.runs import read_run, read_runs
from tests.reporting.making import make_run, write_lines


def test_a_short_run_is_drawn_as_it_is_and_holes_are_left_out() -> None:
    records = [{"step": 0, "mfu": 0.5}, {"step": 1}, {"step": 2, "mfu": None}, {"step": 3, "mfu": 0.25}]
    assert _points(records, _value("mfu", 100)) == [[0, 50.0], [3, 25.0]]


def test_thinning_keeps_means_and_spikes() -> None:
    records = [{"step": step, "loss": 1.0} for step in range(10_000)]
    records[7003]["loss"] = 50.0
    points = _points(records, _value("loss"))
    assert len(points) <= MAX_POINTS and points[0][0] >= 0 and points[-1][0] <= 9999
    (spike,) = [point for point in points if point[3] > 1]
    stretch = 17  # 10,000 over at most 600
    assert spike[3] == 50.0 and spike[2] == 1.0 and abs(spike[1] - (1 + 49 / stretch)) < 1e-4
    assert abs(spike[0] - 7003) <= stretch


def test_one_run_has_a_line_a_band_and_several_have_a_chart_a_band(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    (bands,) = [chart for chart in all_charts([read_run(runs[0])]) if chart["title"] == "Loss by timestep"]
    assert [line["name"] for line in bands["lines"]] == [f"t {k * 25} to {k * 25 + 25} %" for k in range(4)]
    charts = {chart["title"]: chart for chart in all_charts(read_runs(runs))}
    assert [line["name"] for line in charts["Validation loss by timestep 75 to 100 %"]["lines"]] == ["a", "b"]
    assert charts["Loss"]["marks"] == [[100, 0], [100, 1]]
    assert [line["dashed"] for line in charts["Loss"]["lines"]] == [False, False, True, True]
    assert "Skipped updates" not in charts and "Contrastive loss" not in charts


def test_validation_files_of_before_name_their_bands_loss_bands(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 0, "loss": 1.0}])
    write_lines(tmp_path / "validation.jsonl", [{"step": 5, "loss": 2.0, "loss_bands": [1.0, 2.0, 3.0, 4.0]}])
    (bands,) = [chart for chart in all_charts([read_run(tmp_path)]) if chart["title"] == "Validation loss by timestep"]
    assert [line["points"] for line in bands["lines"]] == [[[5, 1.0]], [[5, 2.0]], [[5, 3.0]], [[5, 4.0]]]


def test_what_was_never_logged_has_no_chart(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 0, "loss": 0.0}, {"step": 1, "loss": -1.0, "num_skipped": 2}])
    titles = [chart["title"] for chart in all_charts([read_run(tmp_path)])]
    assert titles == ["Skipped updates"]  # a loss without a logarithm is no line


def test_a_run_from_an_object_store_shows_what_it_asked_for(tmp_path: Path) -> None:
    asked = {"store_mb_per_s": 91.5, "store_retries": 3, "cache_hit_share": 0.25}
    write_lines(tmp_path / "metrics.jsonl", [{"step": 0, "data_wait_share": 0.1, **asked}])
    charts = {chart["title"]: chart["lines"][0]["points"] for chart in all_charts([read_run(tmp_path)])}
    assert charts["Read from the object store"] == [[0, 91.5]] and charts["Found in the local cache"] == [[0, 25.0]]
    assert charts["Requests to the store sent again"] == [[0, 3]]
