"""The arithmetic of many machines: what must hold whatever the figures of a cluster are."""

from dataclasses import replace

import pytest

from benchmarks.scale_simulation import main, order_of
from perceiver.config import ParallelConfig, UserError
from perceiver.costs.devices import DEVICES
from perceiver.costs.scale import GB, Cluster, checkpoint_time, collective_seconds, reads, step_time
from perceiver.data.reading import read_ratio
from perceiver.presets import PRESETS
from ray_jobs import plan
from ray_jobs.memory_check import layout_of, step_of
from ray_jobs.scale import messages, on, poll_seconds, simulate

FREE = Cluster(latency=0.0, intra_node=100 * GB, inter_node=10 * GB)


def c4(workers, replicas=1):
    base = replace(PRESETS["clm-c4"](), parallel=ParallelConfig(workers=8))
    return on(base, workers, replicas)


def time_of(experiment, cluster=FREE, computing=1.0):
    return step_time(step_of(experiment), layout_of(experiment), experiment.parallel.replicas, computing, cluster)


def test_the_slowest_link_of_a_ring_decides():
    assert collective_seconds(FREE, 1 * GB, 8) == pytest.approx(0.01)  # within a node
    assert collective_seconds(FREE, 1 * GB, 16) == pytest.approx(0.1)  # one ring crosses to another node
    assert collective_seconds(FREE, 1 * GB, 2, stride=8) == pytest.approx(0.8)  # eight rings share a node's connection
    assert collective_seconds(FREE, 1 * GB, 2, stride=4) == pytest.approx(0.01)  # both in one node
    assert collective_seconds(FREE, 1 * GB, 4, stride=4) == pytest.approx(0.4)
    assert collective_seconds(FREE, 1 * GB, 1) == 0.0
    assert collective_seconds(replace(FREE, latency=0.5), 0.0, 5, count=3) == 6.0


def test_replicas_of_a_node_gather_within_it_and_sum_between():
    whole, hybrid = time_of(c4(64)), time_of(c4(64, 8))
    assert whole.replicas == 0.0 and hybrid.replicas > 0.0
    assert hybrid.gathering < whole.gathering / 5 and hybrid.reducing < whole.reducing / 5
    one_node = time_of(c4(8))
    assert one_node.gathering == pytest.approx(hybrid.gathering)


def test_traffic_is_hidden_but_for_its_ends_until_it_is_longer_than_the_computation():
    slow, fast = time_of(c4(64), computing=100.0), time_of(c4(64), computing=0.0)
    assert slow.total == pytest.approx(100.0 + slow.exposed) and 0 < slow.exposed < slow.traffic / 10
    assert fast.total == pytest.approx(fast.traffic)
    assert slow.efficiency > 0.99


def test_a_step_without_others_is_its_computation():
    alone = time_of(c4(1))
    assert alone.total == alone.computing == 1.0


@pytest.mark.parametrize("workers", [8, 64, 512])
def test_no_number_of_workers_sends_more_than_a_few_messages_a_second_to_the_driver(workers):
    sent = messages(workers, workers // 8, 0.5, 10)
    assert sent.to_driver < 20 and sent.polls <= 64
    assert poll_seconds(workers) >= 2


def test_storage_limits_many_nodes_and_a_nodes_own_rate_few():
    one, many = (checkpoint_time(100 * GB, workers, Cluster(storage=20 * GB, storage_node=2 * GB)) for workers in (8, 512))
    assert one.writing == pytest.approx(50) and many.writing == pytest.approx(5)
    used = reads(1 * GB, 1.1, 1e6, 8, Cluster(storage=20 * GB, storage_node=2 * GB))
    assert used.share_of_storage == pytest.approx(0.55) and used.requests_per_second == pytest.approx(1100)


def test_what_a_simulation_says_fits_the_counted_reads_and_grows_with_the_machines():
    ratio = read_ratio(order_of(1_000_000, 2048, 2048), 64, 40)
    assert 1.0 <= ratio < 8
    found = [
        simulate(c4(workers), DEVICES["h100"], 0.45, Cluster(), row_bytes=2048, rows_per_block=256, read_ratio=ratio) for workers in (8, 64)
    ]
    assert 1 < found[1].units_per_second / found[0].units_per_second <= 8
    assert found[1].reads.bytes_per_second == pytest.approx(2048 * 2048 * ratio / found[1].step.total)


def test_the_plan_has_the_network_in_its_step_and_refuses_none(capsys):
    assert plan.main(["clm-c4", "--workers", "64", "--device", "h100", "--network", "1"]) == 0
    slow = capsys.readouterr().out
    assert plan.main(["clm-c4", "--workers", "64", "--device", "h100", "--network", "400"]) == 0
    fast = capsys.readouterr().out

    def hours(text):
        return float(text.split("FLOP: ")[1].split(" hours")[0].replace(",", ""))

    assert "1 GB/s a node between" in slow and hours(slow) > 3 * hours(fast)
    with pytest.raises(UserError, match="--network is 0 and must be above 0"):
        plan.main(["clm-c4", "--network", "0"])


def test_the_simulation_prints_a_line_for_each_layout_and_draws_them(tmp_path, monkeypatch, capsys):
    words = ["clm-c4-small", "--gpus", "8", "16", "--rows", "100000", "--plot", str(tmp_path / "p.png"), "--out", str(tmp_path / "r.json")]
    monkeypatch.setattr("sys.argv", ["scale_simulation", *words])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "16 x 1" in lines[2] and "8 x 2" in lines[3]
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "r.json").stat().st_size > 500
