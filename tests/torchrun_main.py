"""What the tests of torchrun start on every rank: `torchrun_main.py MODE [CLUSTER]`."""

import json
import sys
import time

import cluster_programs as programs
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from verify.cluster import RankFailures, open_cluster

WORLD_SIZE = 4


def opened(name, **options):
    return open_cluster(name, world_size=WORLD_SIZE, **options)


def battery(name):
    """Every way to fail, each followed by a run that must work; one JSON line."""
    told = []
    with opened(name, timeout=8, stall=2) as cluster:
        for world_size in (1, 4, 2, 3):
            told.append([x.tolist() for _, _, x in total(cluster, world_size)])
        for program, args in (
            (programs.raise_on, ([1, 2],)),
            (programs.die, (0, "exit")),
            (programs.die, (2, "SIGKILL")),
            (programs.die, (2, "segfault")),
            (programs.die, (1, "SIGSTOP")),
            (programs.partial_collective, ()),
            (programs.hold_the_lock, (1,)),
        ):
            try:
                cluster.run(program, *args, world_size=3)
            except RankFailures as error:
                told.append([type(error).__name__, *([f.rank, f.kind] for f in error.failures)])
            total(cluster, 4)
    with opened(name) as cluster:
        total(cluster, 2)
    print(json.dumps(told))


def total(cluster, world_size):
    return cluster.run(programs.total, 1.0, world_size=world_size)


def property_(name):
    """A property of a defective program, shrunk; prints the examples tried and the minimal one."""
    tried = []
    # The simulator knows a deadlock and needs no patience.
    patience = {} if name == "sim" else {"stall": 20}
    with opened(name, timeout=60, **patience) as cluster:

        @seed(20)
        @settings(
            database=None,
            deadline=None,
            max_examples=40,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(st.integers(1, WORLD_SIZE), st.lists(st.integers(0, 50), max_size=6))
        def sums_agree(world_size, values):
            tried.append([world_size, values])
            per_rank = cluster.run(programs.defective_sum, values, world_size=world_size)
            assert per_rank == [world_size * sum(values)] * world_size

        try:
            sums_agree()
        except (AssertionError, RankFailures) as error:
            print(json.dumps({"tried": tried, "minimal": tried[-1], "kind": type(error).__name__}))


def endless(name):
    """Run until the world is lost."""
    with opened(name, timeout=60) as cluster:
        pids = cluster.run(programs.process_id, world_size=WORLD_SIZE)
        print(json.dumps(pids), flush=True)
        while True:
            total(cluster, WORLD_SIZE)
            time.sleep(0.01)


def absent(name):
    """Open a world in which not every rank arrives."""
    with opened(name, join_timeout=3):
        pass


if __name__ == "__main__":
    modes = {"battery": battery, "property": property_, "endless": endless, "absent": absent}
    modes[sys.argv[1]](sys.argv[2] if len(sys.argv) > 2 else "torchrun")
