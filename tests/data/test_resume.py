"""The position in the data is saved and restored to the bit, wherever it is taken."""

import dataclasses
import json
import time

import grain
import numpy as np
import pytest
from data.batches import BOS, EOS, KEYS, PAD, assert_same, random_documents, take

from swr_jax.data import DataConfig, make_dataset
from swr_jax.data.packing import PackingOptions, PackIterDataset


def through_json(state):
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 5, 11, 30])
@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "prefetched"])
def test_an_iterator_goes_on_exactly_where_its_state_was_taken(config, taken, wrap):
    def fresh():
        dataset = make_dataset(config)
        if wrap:
            dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=3)
        return iter(dataset)

    iterator = fresh()
    take(iterator, taken)
    state = through_json(iterator.get_state())
    expected = take(iterator, 20)
    resumed = fresh()
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same(take(resumed, 20), expected)
    # Back in the same iterator, in the midst of its own prefetching.
    iterator.set_state(state)
    iterator.start_prefetch()
    assert through_json(iterator.get_state()) == state
    assert_same(take(iterator, 20), expected)


def test_a_state_of_a_resumed_iterator_is_good_too(config):
    expected = take(iter(make_dataset(config)), 30)
    given = []
    state = None
    for _ in range(10):
        iterator = iter(make_dataset(config))
        if state is not None:
            iterator.set_state(state)
        given += take(iterator, 3)
        state = through_json(iterator.get_state())
    assert_same(given, expected)


def test_a_state_can_be_taken_and_set_while_packing_is_under_way():
    class SlowDocuments:
        def __len__(self):
            return 200

        def __getitem__(self, index):
            time.sleep(0.002)
            return np.array([BOS, *range(index.__index__() % 200), EOS], np.int32)

    options = PackingOptions(2, 16, 4, 0, 0, 1, PAD, 200)
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    documents = grain.MapDataset.source(SlowDocuments()).to_iter_dataset(read)
    dataset = PackIterDataset(documents, options, np.ones(259, np.int32))
    expected = take(iter(dataset), 12)
    iterator = iter(dataset)
    start = iterator.get_state()
    iterator.start_prefetch()
    time.sleep(0.02)  # the first window is being packed
    assert iterator.get_state() == start
    take(iterator, 5)  # the second window is in use, the third being packed
    state = iterator.get_state()
    iterator.set_state(state)
    assert_same(take(iterator, 7), expected[5:])
    iterator.set_state(start)
    assert_same(take(iterator, 12), expected)


def test_the_end_is_restored_too(config):
    iterator = iter(make_dataset(config, split="validation"))
    batches = list(iterator)
    before_end = iter(make_dataset(config, split="validation"))
    take(before_end, len(batches))
    for finished in (iterator, before_end):
        resumed = iter(make_dataset(config, split="validation"))
        resumed.set_state(through_json(finished.get_state()))
        assert list(resumed) == []


def test_a_failure_leaves_the_state_of_the_last_batch(tmp_path):
    path = tmp_path / "d.jsonl"
    good = [json.dumps({"text": text}) + "\n" for text in random_documents(40, 30)]
    path.write_text("".join([*good, "{bad}\n"]))
    config = DataConfig(
        source=str(path),
        sequence_length=8,
        batch_size=2,
        shuffle_tokens=64,
        validation_fraction=0,
        seed=1,
    )
    iterator = iter(make_dataset(config))
    states = [iterator.get_state()]
    # A generator, because the states before the failure are what matters.
    with pytest.raises(ValueError, match="is not valid JSON"):
        states.extend(iterator.get_state() for _ in iterator)
    assert len(states) > 5
    assert iterator.get_state() == states[-1]
    # Once the line is mended, the run goes on as if nothing had been wrong.
    # In another file of that name: the threads of the first iterator may still be reading theirs.
    another = tmp_path / "another"
    another.write_text("".join([*good, json.dumps({"text": "good"}) + "\n"]))
    another.replace(path)
    mended = iter(make_dataset(config))
    mended.set_state(states[-1])
    expected = take(iter(make_dataset(config)), len(states) + 9)
    assert_same(take(mended, 10), expected[-10:])


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"sequence_length": 8}, {"seed": 1}])
def test_a_state_of_other_batches_is_refused(config, change):
    state = through_json(iter(make_dataset(config)).get_state())
    other = iter(make_dataset(dataclasses.replace(config, **change)))
    with pytest.raises(ValueError, match=r"state was taken with .*: they must be equal"):
        other.set_state(state)


def test_the_number_of_processes_may_change_on_the_way(config):
    whole = iter(make_dataset(config))
    take(whole, 6)
    half = iter(make_dataset(config, process_index=1, process_count=2))
    half.set_state(through_json(whole.get_state()))
    for batch, part in zip(take(whole, 8), take(half, 8), strict=True):
        for key in KEYS:
            np.testing.assert_array_equal(part[key], batch[key][2:])


def test_two_hosts_then_one_then_four_give_the_batches_of_one(config):
    expected = take(iter(make_dataset(config)), 24)
    state, given = None, []
    for count in (2, 1, 4):
        hosts = [
            iter(make_dataset(config, process_index=i, process_count=count)) for i in range(count)
        ]
        if state is not None:
            for host in hosts:
                host.set_state(state)
        parts = [take(host, 8) for host in hosts]
        given += [
            {key: np.concatenate([batch[key] for batch in batches]) for key in KEYS}
            for batches in zip(*parts, strict=True)
        ]
        states = [through_json(host.get_state()) for host in hosts]
        assert all(other == states[0] for other in states)  # so one is kept for all
        state = states[0]
    assert_same(given, expected)


def test_state_goes_through_a_checkpoint_on_disk(config, tmp_path):
    iterator = iter(make_dataset(config))
    take(iterator, 7)
    handler = grain.checkpoint.CheckpointHandler()
    handler.save(tmp_path, item=iterator)
    expected = take(iterator, 5)
    resumed = handler.restore(tmp_path, item=iter(make_dataset(config)))
    assert_same(take(resumed, 5), expected)


def test_threads_change_nothing(config):
    expected = take(iter(make_dataset(config)), 20)
    many = dataclasses.replace(config, read_threads=13)
    assert_same(take(iter(make_dataset(many)), 20), expected)
