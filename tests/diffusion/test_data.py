"""Text to batches: what is found in samples, files and folders, token ids and their ends, orders that are resumed."""

import gzip
import hashlib
import json
import pickle
import re
from itertools import chain, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("datasets", reason="comes with the extra `train`")
pytest.importorskip("transformers", reason="comes with the extra `train`")

import datasets
import huggingface_hub
from small import WORDS, tokenizer

from smoothie_kernels.diffusion import data
from smoothie_kernels.diffusion.batches import Collate, Stream
from smoothie_kernels.diffusion.data import Counts, has_split, load_text, read_text, tokenize
from smoothie_kernels.diffusion.tokens import end_token, pad_token

PAIRS = [{"source": "a cat", "target": "the cat"}, {"source": "a dog", "target": "the dog is old"}]
PAD, UNK, CLS, SEP = range(4)
IDS = {word: index for index, word in enumerate(WORDS, 4)}


@pytest.fixture(autouse=True)
def _nothing_is_left_and_nobody_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    if ".json" in path.name:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    else:
        rows = datasets.Dataset.from_list(rows)
        rows.to_csv(path) if ".csv" in path.name else rows.to_parquet(path)
    return str(path)


def listed(rows):
    return [{name: row[name] for name in sorted(row)} for row in rows]


# --- samples


@pytest.mark.parametrize("name", data._samples())
def test_samples_are_what_their_pages_say(name):
    folder, unconditional = data.SAMPLES / name, name == "unconditional"
    page = (folder / "SOURCE.md").read_text()
    table = (data.SAMPLES / "README.md").read_text()
    for split in ("train", "validation"):
        rows = load_text(name, split, unconditional=unconditional)
        assert set(rows.column_names) == ({"target"} if unconditional else {"source", "target"})
        content = (folder / f"{split}.jsonl.gz").read_bytes()
        assert content[4:8] == bytes(4)  # no time: the same rows are the same file
        assert f"| {split} | {len(rows):,} | `{hashlib.sha256(content).hexdigest()}` |" in page
        assert re.search(rf"\| `{name}` \| .*\| {len(rows):,} \|", table)
    assert not has_split(name, "test")
    licence = re.search(r"\*\*Licence:\*\* (CC BY[A-Z0-9. -]*\d)", page)[1]
    assert re.search(rf"\| `{name}` .*\| {licence}( FR)? \|\n", table)


# --- load_text


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv", "-00000-of-00001.parquet"])
def test_forms_of_files(tmp_path, ending):
    folder = tmp_path / "mine"
    file = write(folder / f"train{ending}", PAIRS)
    assert listed(load_text(str(folder), "train")) == PAIRS
    assert listed(load_text(file, "train")) == PAIRS
    assert not has_split(str(folder), "validation")
    assert not has_split(file, "validation")


def test_parts_of_a_split_come_in_order(tmp_path):
    for part in (1, 0):
        write(tmp_path / "mine" / f"train-0000{part}-of-00002.parquet", [PAIRS[part]])
    assert listed(load_text(str(tmp_path / "mine"), "train")) == PAIRS


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_names_of_the_validation_split(tmp_path, name):
    write(tmp_path / "mine" / f"{name}.jsonl", PAIRS)
    assert has_split(str(tmp_path / "mine"), "validation")
    assert listed(load_text(str(tmp_path / "mine"), "validation")) == PAIRS


@pytest.mark.parametrize(
    ("columns", "source", "target"),
    [
        (("src", "trg"), "src", "trg"),
        (("id", "Document", "summary"), "Document", "summary"),
        (("question", "context", "answers"), "context", "question"),
        (("text", "target", "source"), "source", "target"),
    ],
)
def test_usual_names_of_columns(tmp_path, columns, source, target):
    file = write(tmp_path / "x.jsonl", [{name: f"{name} is" for name in columns}])
    assert listed(load_text(file, "train")) == [{"source": f"{source} is", "target": f"{target} is"}]


def test_columns_that_are_named(tmp_path):
    row = {"source": "s", "target": "t", "question": "q", "translation": {"de": "ein Hund", "en": "a dog"}}
    file = write(tmp_path / "x.jsonl", [row])

    def columns(source=None, target=None):
        return listed(load_text(file, "train", source_column=source, target_column=target))[0]

    assert columns() == {"source": "s", "target": "t"}
    assert columns("translation.de", "translation.en") == {"source": "ein Hund", "target": "a dog"}
    assert columns("target", "source") == {"source": "t", "target": "s"}
    assert columns("target") == {"source": "t", "target": "q"}  # which is not the source as well
    assert listed(load_text(file, "train", unconditional=True)) == [{"target": "t"}]
    assert listed(load_text(file, "train", unconditional=True, target_column="question")) == [{"target": "q"}]


@pytest.mark.parametrize("column", ["text", "sentence", "Story"])
def test_text_alone(tmp_path, column):
    file = write(tmp_path / "x.jsonl", [{column: "a cat", "id": 1}])
    assert listed(load_text(file, "train", unconditional=True)) == [{"target": "a cat"}]


def test_rows_without_text_are_dropped_and_counted(tmp_path):
    empty = [{"source": "", "target": "x"}, {"source": "x", "target": " \n"}, {"source": "x", "target": None}]
    file = write(tmp_path / "x.jsonl", [PAIRS[0], *empty, PAIRS[1]])
    text = read_text(file, "train")
    assert listed(text.rows) == PAIRS
    assert text[1:] == ({"target": "target", "source": "source"}, 5, {"target": 2, "source": 1})
    assert read_text(write(tmp_path / "y.jsonl", PAIRS), "train")[2:] == (2, {})
    words = write(tmp_path / "x.csv", [{"text": word} for word in ("NA", "null", "", "7 up")])
    assert listed(load_text(words, "train", unconditional=True)) == [{"target": w} for w in ("NA", "null", "7 up")]


def test_a_data_set_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        rows = datasets.Dataset.from_list(PAIRS)
        return datasets.DatasetDict({"train": rows, "dev": rows.select([0])})

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    assert listed(load_text("some/set", "train")) == PAIRS
    assert listed(load_text("some/set:config", "validation")) == PAIRS[:1]
    assert has_split("set", "validation")
    assert not has_split("set", "test")
    assert asked == [("some/set", None), ("some/set", "config"), ("set", None), ("set", None)]
    with pytest.raises(ValueError, match="data must have a split 'test', got 'set' with 'train', 'validation'"):
        load_text("set", "test")


@pytest.mark.parametrize(
    ("files", "call", "message"),
    [
        ({}, {"data": "some/set"}, r"data must be a sample \(paraphrase, .*\), a folder, .* got 'some/set': Could"),
        ({}, {"data": "./none"}, "data must be a folder or file that exists, got './none'"),
        ({}, {"data": "none.jsonl.gz"}, "data must be a folder or file that exists, got 'none.jsonl.gz'"),
        ({"a.txt": PAIRS}, {"data": "a.txt"}, "must be a file that ends in '.jsonl', .* or .gz, got 'a.txt'"),
        ({"a.parquet.gz": PAIRS}, {"data": "a.parquet.gz"}, "must be a file that ends in .* got 'a.parquet.gz'"),
        ({"a.parquet": b"none"}, {"data": "a.parquet"}, "data must be Parquet, got 'a.parquet' behind row 0: "),
        ({"a.jsonl.gz": b"none"}, {"data": "a.jsonl.gz"}, "data must be .* that can be read, got 'a.jsonl.gz': "),
        ({"m/dev.csv": PAIRS}, {"data": "m"}, "data must have a split 'train', got 'm' with 'validation'"),
        ({"m/x.csv": PAIRS}, {"data": "m"}, "data must have a split 'train', got 'm' with none"),
        ({"a.csv": PAIRS}, {"data": "a.csv", "split": "test"}, "a split 'test', got 'a.csv' with 'train'"),
        (
            {"m/train.csv": PAIRS, "m/train.jsonl": PAIRS}, {"data": "m"},
            "data must have split 'train' once, got 'train.jsonl', 'train.csv' in 'm'",
        ),
        (
            {"a.csv": [{"id": 3, "text": "x"}]}, {"data": "a.csv"},
            "target_column must be given for 'a.csv', whose columns are 'id', 'text'; unconditional where .* no source",
        ),
        (
            {"a.jsonl": [{"t": {"de": "x", "en": "y"}}]}, {"data": "a.jsonl"},
            "target_column must be given for 'a.jsonl', whose columns are 't.de', 't.en'",
        ),
        ({"a.csv": [{"target": "x"}]}, {"data": "a.csv"}, "source_column must be given .* are 'target'; unconditional"),
        (
            {"a.csv": [{"x": "x"}]}, {"data": "a.csv", "unconditional": True},
            "target_column must be given for 'a.csv', whose columns are 'x'$",
        ),
        (
            {"a.csv": PAIRS}, {"data": "a.csv", "source_column": "src"},
            "source_column must be one of the columns of 'a.csv', 'source', 'target', got 'src'",
        ),
        ({"a.csv": PAIRS}, {"data": "a.csv", "target_column": "x.y"}, "target_column must be one of .* got 'x.y'"),
        (
            {"a.csv": PAIRS}, {"data": "a.csv", "source_column": "x", "target_column": "x"},
            "source_column and target_column must differ, got 'x' for both",
        ),
        (
            {"a.csv": PAIRS}, {"data": "a.csv", "source_column": "x", "unconditional": True},
            "source_column must be None where there is no source, got 'x'",
        ),
        (
            {"a.jsonl": [*PAIRS, {"source": "x", "target": 7}]}, {"data": "a.jsonl"},
            "column 'target' must hold strings, got int in line 3 of a.jsonl",
        ),
        (
            {"a.jsonl": [{"source": ["x"], "target": "y"}]}, {"data": "a.jsonl"},
            "column 'source' must hold strings, got list in line 1 of a.jsonl",
        ),
        (
            {"a.jsonl": [{"source": " ", "target": "y"}]}, {"data": "a.jsonl"},
            "split 'train' of 'a.jsonl' must have rows with text, got 1 without",
        ),
    ],
)  # fmt: skip
def test_messages(tmp_path, monkeypatch, files, call, message):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        if isinstance(content, bytes) or name.endswith((".txt", ".parquet.gz")):
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else b"")
        else:
            write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        load_text(**{"split": "train"} | call)


# --- tokenize


def tokens_of(texts, words=None, length=6):
    rows = datasets.Dataset.from_dict({"target": texts})
    return tokenize(rows, words or tokenizer(), target_length=length, source_length=1)[0]["target"][:]


def test_texts_begin_and_end_as_the_tokenizer_has_them():
    cat, dog, the, is_, old = (IDS[word] for word in ("cat", "dog", "the", "is", "old"))
    rows, _ = tokenize(datasets.Dataset.from_list(PAIRS), tokenizer(), target_length=5, source_length=9)
    assert set(rows.column_names) == {"source", "target"}
    assert rows["source"][1] == [CLS, IDS["a"], dog, SEP]
    assert rows["target"][:] == [[CLS, the, cat, SEP], [CLS, the, dog, is_, SEP]]  # the second is cut
    assert tokens_of(["the old dog", "rook"]) == [[CLS, the, old, dog, SEP], [CLS, UNK, SEP]]
    assert tokens_of(["the dog"], length=1) == [[SEP]]


def test_an_end_token_is_added_where_the_tokenizer_adds_none():
    the, dog, end = IDS["the"], IDS["dog"], IDS["end"]
    words = tokenizer(special=False, eos_token="end", sep_token=None)
    assert tokens_of(["the dog", "the dog the dog the dog", "the end"], words, length=4) == [
        [the, dog, end], [the, dog, the, end], [the, end],
    ]  # fmt: skip


def test_a_tokenizer_that_cuts_and_pads_by_itself_does_not_here():
    words = tokenizer()
    words.backend_tokenizer.enable_truncation(3)
    words.backend_tokenizer.enable_padding(length=9)
    assert tokens_of(["the dog is"], words) == [[CLS, IDS["the"], IDS["dog"], IDS["is"], SEP]]


def test_which_token_ends_and_which_pads():
    end = IDS["end"]
    assert end_token(tokenizer()) == SEP
    assert end_token(tokenizer(eos_token="end")) == SEP  # with which it ends
    assert end_token(tokenizer(eos_token="end", special=False)) == end
    assert end_token(tokenizer(eos_token="end", sep_token=None)) == end
    assert pad_token(tokenizer(eos_token="end")) == PAD
    assert pad_token(tokenizer(eos_token="end", pad_token=None)) == end
    with pytest.raises(ValueError, match=r"must have an end or separator token, got .* without"):
        end_token(tokenizer(sep_token=None))
    with pytest.raises(ValueError, match=r"must have a padding or end token, got .* without"):
        pad_token(tokenizer(pad_token=None))


def test_what_texts_lose_is_counted():
    words = tokenizer()
    rows = datasets.Dataset.from_list(
        [
            {"source": "a cat", "target": "the rook"},
            {"source": "the old dog is at home", "target": "a [SEP] the"},
            {"source": "rook rook rook", "target": "it [PAD]"},
        ]
    )
    lengths = {"target_length": 5, "source_length": 4}
    _, counts = tokenize(rows, words, **lengths)
    assert counts == {
        "source": Counts(tokens=12, cut=2, unknown=2, ended=0, special=[UNK, CLS, SEP]),
        "target": Counts(tokens=13, cut=0, unknown=1, ended=2, special=[PAD, UNK, CLS, SEP]),
    }
    again, cached = tokenize(rows, words, **lengths)
    assert (again.column_names, cached) == (["source", "target"], counts)
    _, counts = tokenize(rows.select([0]), tokenizer(special=False, eos_token="end", sep_token=None), **lengths)
    assert counts["source"] == Counts(tokens=3, cut=0, unknown=0, ended=0, special=[IDS["end"]])
    gpt = tokenizer(special=False, eos_token="end", unk_token="end", sep_token=None)  # one token for all, as GPT-2's
    _, counts = tokenize(rows.select([0]), gpt, **lengths)
    assert counts["source"].unknown == 0


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    """It is not the data's fault, and the message names the folder that is full."""
    (tmp_path / "train.jsonl").write_text('{"source": "a", "target": "b"}')

    def full(*_, **__):
        raise datasets.exceptions.DatasetGenerationError from OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "from_generator", full)
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '.*cache'"):
        load_text(str(tmp_path), "train")


@pytest.mark.parametrize("column", ["target", "source"])
def test_messages_of_lengths(column):
    lengths = {"target_length": 3, "source_length": 3} | {f"{column}_length": 0}
    with pytest.raises(ValueError, match=f"{column}_length must be positive, got 0"):
        tokenize(datasets.Dataset.from_list(PAIRS), tokenizer(), **lengths)


# --- Stream


def batches(stream, many=5):
    return list(islice(stream, many))


@given(st.integers(1, 12), st.integers(1, 7), st.integers(0, 2**70), st.integers(0, 40))
def test_epochs_are_permutations_one_after_the_other(length, batch_size, seed, start):
    """Batch k holds places k B to k B + B - 1, wherever the stream starts."""
    rows = [row for batch in batches(Stream(length, batch_size, seed), start + 8) for row in batch]
    for first in range(0, len(rows) - length + 1, length):
        assert sorted(rows[first : first + length]) == list(range(length))
    later = batches(Stream(length, batch_size, seed, start=start), 8)
    assert [row for batch in later for row in batch] == rows[start * batch_size :]
    assert all(len(batch) == batch_size for batch in later)


@given(st.integers(1, 9), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 30))
def test_the_shares_of_processes_make_the_batch(length, shares, start):
    whole = batches(Stream(length, sum(shares), 3, start=start))
    firsts = [sum(shares[:rank]) for rank in range(len(shares))]
    parts = [
        batches(Stream(length, sum(shares), 3, start=start, first=first, count=share))
        for first, share in zip(firsts, shares, strict=True)
    ]
    assert [[*chain(*batch)] for batch in zip(*parts, strict=True)] == whole
    last = Stream(length, sum(shares), 3, start=start, first=firsts[-1])
    assert batches(last) == parts[-1]


def test_seeds_and_epochs_have_other_orders_and_streams_begin_again():
    stream = Stream(500, 500, 1)
    first, second = batches(stream, 2)
    assert batches(stream, 2) == [first, second]
    assert first != second
    other = batches(Stream(500, 500, 2), 2)
    assert first not in other
    assert second not in other
    assert batches(Stream(8, 8, 0), 1) == [[3, 2, 0, 4, 6, 7, 5, 1]]  # of all releases: runs are resumed
    state = torch.get_rng_state()
    batches(Stream(3, 2, 99))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "length must be positive, got 0"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"start": -1}, "start must not be negative, got -1"),
        ({"first": 4}, r"first must be in \[0, batch_size\) with batch_size = 4, got 4"),
        ({"first": -1}, r"first must be in \[0, batch_size\) with batch_size = 4, got -1"),
        ({"first": 1, "count": 4}, r"count must be in \[1, batch_size - first\] = \[1, 3\], got 4"),
        ({"count": 0}, r"count must be in .* \[1, 4\], got 0"),
    ],
)
def test_messages_of_streams(change, message):
    with pytest.raises(ValueError, match=message):
        Stream(**{"length": 10, "batch_size": 4, "seed": 0} | change)


# --- Collate


def test_rows_are_padded_and_masked():
    rows = [{"target": [5, 6, 2], "source": [7]}, {"target": [2], "source": [8, 9]}]
    collate = pickle.loads(pickle.dumps(Collate(9, 3, 4)))
    batch = collate(rows)
    assert batch["target"].tolist() == [[5, 6, 2], [2, 9, 9]]
    assert batch["target_mask"].tolist() == [[True] * 3, [True, False, False]]
    assert batch["source"].tolist() == [[7, 9, 9, 9], [8, 9, 9, 9]]
    assert batch["source_mask"].sum(1).tolist() == [1, 2]
    assert {name: ids.dtype for name, ids in batch.items()} == {
        name: torch.bool if "mask" in name else torch.int64 for name in batch
    }
    assert set(collate([{"target": [1]}])) == {"target", "target_mask"}
    for column, length in (("target", 3), ("source", 4)):
        with pytest.raises(ValueError, match=f"{column} must have at most {length} tokens, got 5"):
            collate([rows[0] | {column: [1] * 5}])


@pytest.mark.parametrize("workers", [0, 2])
def test_from_a_sample_to_batches(workers):
    rows = load_text("simplification", "validation").select(range(50))
    ids, _ = tokenize(rows, tokenizer(), target_length=20, source_length=30)
    loader = torch.utils.data.DataLoader(
        ids, batch_sampler=Stream(len(ids), 64, 0, start=3, first=10, count=4),
        collate_fn=Collate(PAD, 20, 30), num_workers=workers,
    )  # fmt: skip
    wanted = batches(Stream(len(ids), 64, 0, start=3), 3)
    for batch, numbers in zip(loader, wanted, strict=False):
        assert batch["target"].shape == batch["target_mask"].shape == (4, 20)
        assert batch["source"].shape == (4, 30)
        for place, number in enumerate(numbers[10:14]):
            text = ids[number]["target"]
            assert batch["target"][place].tolist() == text + [PAD] * (20 - len(text))
            assert batch["target_mask"][place].sum() == len(text)
