"""Cores by affinity and by the quotas of cgroups, and the environment that OpenMP reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from resight.machine import SPIN_COUNT, cores, threads

ALL = len(os.sched_getaffinity(0))


def system(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A file system's ``proc`` and ``sys`` with one process in a cgroup."""
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, ALL),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),  # half a core still needs one thread
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "6400000 100000\n"}, ALL),  # affinity is the smaller one
        ("0::/pods/a\n", {"sys/fs/cgroup/pods/cpu.max": "100000 100000\n"}, 1),  # a parent's quota applies too
        ("0::/pods/a\n", {"sys/fs/cgroup/pods/a/cpu.max": "90000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "nonsense\n"}, ALL),
        ("0::/\n", {}, ALL),
        (
            "4:cpu,cpuacct:/docker/a\n2:memory:/docker/a\n0::/\n",
            {
                "sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            "4:cpu,cpuacct:/docker/a\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            1,  # in a container, whose own cgroup is the mount's root
        ),
        (
            "4:cpu:/\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            ALL,
        ),
    ],
)
def test_cores_are_the_smaller_of_affinity_and_quota(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: int
) -> None:
    assert cores(system(tmp_path, cgroup, files)) == expected


def test_without_proc_the_affinity_counts(tmp_path: Path) -> None:
    assert cores(tmp_path) == ALL


@pytest.mark.parametrize(
    ("value", "expected"), [("3", 3), ("2,1", 2), ("", cores()), ("0", cores()), ("many", cores())]
)
def test_threads_follow_the_users_omp_num_threads(monkeypatch: pytest.MonkeyPatch, value: str, expected: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert threads() == expected


REPORT = (
    "import sys; from resight.cli import main; sys.argv = ['resight', '--help']\n"
    "try:\n    main()\nexcept SystemExit:\n    pass\n"
    "import os, torch; names = 'OMP_NUM_THREADS GOMP_SPINCOUNT OMP_WAIT_POLICY'.split()\n"
    "print('threads', torch.get_num_threads(), *(os.environ.get(name, '-') for name in names))"
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, f"threads {cores()} {cores()} {SPIN_COUNT} -"),
        ({"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "7"}, "threads 1 1 7 -"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, f"threads {cores()} {cores()} - PASSIVE"),
    ],
)
def test_the_command_line_sets_variables_that_are_not_set(given: dict[str, str], expected: str) -> None:
    names = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    done = subprocess.run(
        [sys.executable, "-c", REPORT], capture_output=True, text=True, check=True, env=environment, timeout=120
    )
    assert done.stdout.splitlines()[-1] == expected
