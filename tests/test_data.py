from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from impl.data import CORPUS
from impl.data.batches import Batches
from impl.data.sampler import Sampler, Samples
from impl.data.tokenizer import ByteTokenizer
from impl.data.tokens import open_tokens, token_file
from impl.groups import build_groups
from verify.cluster import open_cluster
from verify.layout import Layout

TOKENIZER = ByteTokenizer()


def test_every_text_comes_back():
    for text in ("", "Shall I compare thee", "déjà vu, 十四行诗\n"):
        tokens = TOKENIZER.encode(text)
        assert tokens.dtype == np.uint16
        assert tokens[-1] == TOKENIZER.end
        assert TOKENIZER.decode(tokens) == text
    assert TOKENIZER.decode([195]) == "\ufffd"
    with pytest.raises(ValueError, match="257 is not one of 0 to 256"):
        TOKENIZER.decode([257])


def test_the_corpus_is_shipped_and_plain():
    text = CORPUS.read_text(encoding="ascii")
    assert len(text) > 30 * 1024
    assert "Shall I compare thee to a summer's day?" in text


def test_a_token_file_is_made_once_for_a_text(tmp_path):
    text = tmp_path / "poem.txt"
    text.write_text("one")
    cache = tmp_path / "cache"
    path = token_file(text, cache=cache, tokenizer=TOKENIZER)
    made = path.stat().st_mtime_ns
    assert token_file(text, cache=cache, tokenizer=TOKENIZER) == path
    assert path.stat().st_mtime_ns == made
    tokens = open_tokens(path)
    assert isinstance(tokens, np.memmap)
    assert not tokens.flags.writeable
    assert tokens.tolist() == [*b"one", TOKENIZER.end]
    text.write_text("two")
    assert token_file(text, cache=cache, tokenizer=TOKENIZER) != path
    assert sorted(cache.iterdir()) == sorted(cache.glob("*.npy"))


def test_texts_and_files_that_are_none_are_one_line(tmp_path):
    latin, empty, other = tmp_path / "latin.txt", tmp_path / "empty.npy", tmp_path / "other.npy"
    latin.write_bytes(b"caf\xe9")
    empty.write_bytes(b"")
    np.save(other, np.zeros((2, 2)))
    for given, words in ((latin, "no UTF-8 at byte 3"), (tmp_path / "none", "No such file")):
        with pytest.raises(ValueError, match=words) as caught:
            token_file(given, cache=tmp_path / "cache", tokenizer=TOKENIZER)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="Not a directory"):
        token_file(CORPUS, cache=latin / "cache", tokenizer=TOKENIZER)
    for given, words in ((empty, "truncated"), (other, r"float64 \[2, 2\], not uint16")):
        with pytest.raises(ValueError, match=words):
            open_tokens(given)


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own():
    sampler = Sampler(count=7, seed=3)
    epochs = [[sampler.at(7 * epoch + i) for i in range(7)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert all(one != other for one, other in pairwise(epochs))
    again = Sampler(count=7, seed=3)
    assert [again.at(i) for i in range(28)] == [i for epoch in epochs for i in epoch]
    assert [Sampler(count=7, seed=4).at(i) for i in range(7)] != epochs[0]


@pytest.mark.parametrize(("dp", "microbatch"), [(1, 1), (1, 4), (2, 1), (4, 3), (3, 2), (12, 1)])
def test_a_step_has_the_same_samples_at_any_layout(dp, microbatch):
    sampler, consumed = Sampler(count=50, seed=0), 41
    found = [
        sampler.batch(consumed, size=12, dp_rank=d, dp_size=dp, microbatch_size=microbatch)
        for d in range(dp)
    ]
    assert {len(own) for own in found} == {12 // (dp * microbatch)}
    in_order = [i for m in range(len(found[0])) for own in found for i in own[m]]
    assert in_order == [sampler.at(consumed + i) for i in range(12)]


def test_sizes_that_do_not_divide_are_one_line():
    for size, dp, microbatch in ((4, 3, 1), (4, 1, 3), (0, 1, 1)):
        with pytest.raises(ValueError, match=f"global_batch_size: {size} does not divide"):
            Sampler(count=9, seed=0).batch(
                0, size=size, dp_rank=0, dp_size=dp, microbatch_size=microbatch
            )
    with pytest.raises(ValueError, match="length: 4 tokens have no sample of 4"):
        Samples(np.arange(4, dtype=np.uint16), 4)


def test_targets_are_the_tokens_after():
    samples = Samples(np.arange(10, dtype=np.uint16), 4)
    assert samples.count == 2
    tokens, targets = samples.stack([1, 0])
    assert tokens.tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert torch.equal(targets, tokens + 1)


def _own_tokens(layout: Layout) -> list[torch.Tensor]:
    groups = build_groups(layout)
    batches = Batches(
        samples=Samples(np.arange(65, dtype=np.uint16), 8),
        sampler=Sampler(count=8, seed=1),
        size=4,
        microbatch_size=2,
        groups=groups,
    )
    found = [each.tokens for each in batches.after(2)]
    assert all(torch.equal(each.targets, each.tokens + 1) for each in batches.after(2))
    return found


def test_ranks_of_cp_and_dp_have_all_tokens_of_a_step_once():
    with open_cluster("sim", world_size=8) as cluster:
        ((whole, rest),) = cluster.run(_own_tokens, Layout(), world_size=1)
        expected = torch.cat([whole, rest]).flatten().sort().values
        for layout in (Layout(cp=2), Layout(dp=2), Layout(cp=2, dp=2), Layout(tp=2, cp=4)):
            found = cluster.run(_own_tokens, layout, world_size=layout.world_size)
            mine = torch.cat([t.flatten() for own in found[:: layout.tp] for t in own])
            assert torch.equal(mine.sort().values, expected), layout
            for rank in range(layout.world_size):
                first = rank - rank % layout.tp
                assert all(map(torch.equal, found[rank], found[first]))


def test_the_text_of_a_sample_is_of_the_corpus(tmp_path: Path):
    tokens = open_tokens(token_file(CORPUS, cache=tmp_path, tokenizer=TOKENIZER))
    samples = Samples(tokens, 64)
    rows, _ = samples.stack([0, samples.count - 1])
    text = CORPUS.read_text()
    assert text.startswith(TOKENIZER.decode(rows[0].tolist()))
    assert TOKENIZER.decode(rows[1].tolist()) in text
