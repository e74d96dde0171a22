"""Processes that are about to do different things are told apart, and by name."""

import numpy as np

from swr_jax.train.agreement import check_agreement, disagreements


def digests(*rows: str) -> np.ndarray:
    """One letter per name for every process."""
    return np.array([[[ord(letter)] for letter in row] for row in rows], np.uint8)


HOSTS = ["a", "b", "c", "d"]


def test_equal_ones_agree():
    assert disagreements(["x", "y"], digests("pq", "pq", "pq"), HOSTS) == {}


def test_those_that_differ_from_most_are_named():
    found = disagreements(["x", "y", "z"], digests("pqa", "pqb", "rqa", "pqc"), HOSTS)
    assert found == {"x": "process 2 (c) in x", "z": "processes 1 (b), 3 (d) in z"}


def test_of_two_the_first_counts():
    assert disagreements(["x"], digests("p", "q"), HOSTS) == {"x": "process 1 (b) in x"}


def test_one_process_agrees_with_itself(config):
    check_agreement(config)
