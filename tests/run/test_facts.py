"""What a run folder records about how the run was made."""

import json
import subprocess

import torch

from latte_scale.run.facts import collect_facts, describe_rank, environment, git_commit, write_facts


def test_facts_name_what_made_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr("sys.argv", ["train", "--config", "x.yaml"])
    facts = collect_facts([describe_rank(0, "cpu"), describe_rank(1, "cpu")], "abc")
    assert facts["command"][1:] == ["train", "--config", "x.yaml"]
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["environment"]["SLURM_JOB_ID"] == "17"
    assert [rank["rank"] for rank in facts["ranks"]] == [0, 1] and len(facts["hosts"]) == 1
    assert facts["data_fingerprint"] == "abc"
    (tmp_path / "logs").mkdir()
    for attempt in (1, 2):
        write_facts(tmp_path, {**facts, "attempt": attempt})
    assert json.loads((tmp_path / "facts.json").read_text())["attempt"] == 2
    lines = (tmp_path / "logs" / "facts.jsonl").read_text().splitlines()
    assert [json.loads(line)["attempt"] for line in lines] == [1, 2]


def test_the_build_of_torch_is_named(monkeypatch):
    """The metadata of a package index's torch has no "+cu130"."""
    monkeypatch.setattr("torch.__version__", "2.13.0+cu130")
    assert collect_facts([], "abc")["versions"]["torch"] == "2.13.0+cu130"


def test_no_secret_is_written():
    kept = environment(
        {
            "NCCL_DEBUG": "INFO",
            "AWS_SECRET_ACCESS_KEY": "s",
            "AWS_SESSION_TOKEN": "t",
            "SLURM_JWT": "j",
            "TORCH_API_KEY": "k",
            "HOME": "/root",
            "MASTER_ADDR": "node1",
            "LOCAL_RANK": "0",
        }
    )
    assert kept == {"LOCAL_RANK": "0", "MASTER_ADDR": "node1", "NCCL_DEBUG": "INFO"}


def test_the_commit_says_whether_files_differ_from_it(tmp_path):
    assert git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "a").write_text("1")
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    clean = git_commit(tmp_path)
    assert clean is not None and len(clean) == 40
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == clean + "-dirty"
