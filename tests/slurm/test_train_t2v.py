"""slurm/train_t2v.sh on a real Slurm, two nodes: to the end, and requeued on the way. The rest is in long_form.py."""

import pytest

from tests.slurm.jobs import STEPS, assert_same_losses

pytestmark = pytest.mark.slurm


def test_two_nodes_train_to_the_end(unbroken):
    assert [record["step"] for record in unbroken.run.metrics] == list(range(STEPS))
    assert unbroken.run.exit["code"] == 0 and unbroken.run.exit["job_id"] == unbroken.id
    assert "2 x cpu" in (unbroken.folder / "logs" / "rank-00000.out").read_text()
    assert "finished" in unbroken.log and unbroken.restarts == 0


def test_a_requeued_job_goes_on_with_the_same_losses(train, cluster, unbroken):
    job = train("run")
    job.wait_step(60)
    cluster.call("scontrol", "requeue", job.id)
    assert job.wait_end() == "COMPLETED", job.story()
    assert job.restarts == 1
    assert_same_losses(job, unbroken.run)
