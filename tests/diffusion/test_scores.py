"""The metrics of texts: known answers, the libraries called directly, and what must hold for any texts."""

import math
import random
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sacrebleu", reason="comes with the extra `evaluate`")
pytest.importorskip("rouge_score", reason="comes with the extra `evaluate`")

import sacrebleu
from rouge_score import rouge_scorer

from smoothie_kernels.diffusion import scores

pytestmark = pytest.mark.usefixtures("one_thread")
SPECIES = "About 95 species are currently accepted."
ACCEPTED = [
    "About 95 species are currently known.",
    "About 95 species are now accepted.",
    "95 species are now accepted.",
]
# Quotes, entities, numbers, letters of other scripts, a text that says nothing, and one of white space.
TRICKY = [
    (
        "He said: \"don't &amp; won't\", 3.5 times.",
        ["He said \"don't and won't\" 3.5 times.", "He did not."],
        "He spoke.",
    ),
    ("", ["There was nothing to say."], "Nothing was there to be said."),
    ("Running runners ran\trunningly  ", ["The runner runs.", "A run.", "Runners were running"], "Who ran?"),
    ("Die Straße ist naß 中文 .", ["Die Straße ist nass, 中文."], "Die nasse Straße"),
    (" ", ["the"], "the the the"),
]
TEXTS, REFERENCES, SOURCES = ([row[column] for row in TRICKY] for column in range(3))
WORDS = ["the", "The", "cat", "cats", "sat", ".", "3.5", "ü"]
sentences = st.lists(st.sampled_from(WORDS), max_size=7).map(" ".join)
samples = st.lists(st.tuples(sentences, st.lists(sentences, min_size=1, max_size=3), sentences), min_size=1, max_size=5)


def columns(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def all_scores(rows) -> dict[str, float]:
    texts, references, sources = columns(rows)
    return {
        "bleu": scores.bleu(texts, references) / 100,
        "chrf": scores.chrf(texts, references) / 100,
        "sari": scores.sari(texts, references, sources) / 100,
        **scores.rouge(texts, references),
        **scores.distinct(texts),
    }


# --- BLEU, chrF, ROUGE: the libraries themselves


def by_sentence(kind, **options):
    """Statistics of single texts, added up: no list of references has holes here."""
    metric = kind(**options)
    rows = [metric._extract_corpus_statistics([text], [[r] for r in refs])[0] for text, refs, _ in TRICKY]
    return metric._aggregate_and_compute(rows).score


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize(("name", "kind"), [("bleu", "BLEU"), ("chrf", "CHRF")])
def test_sacrebleu(name, kind, lowercase):
    score = getattr(scores, name)(TEXTS, REFERENCES, lowercase=lowercase)
    assert score == pytest.approx(by_sentence(getattr(sacrebleu.metrics, kind), lowercase=lowercase), abs=1e-9)
    assert 10 < score < 60


@pytest.mark.parametrize(("name", "direct"), [("bleu", "corpus_bleu"), ("chrf", "corpus_chrf")])
def test_sacrebleu_with_as_many_references_everywhere(name, direct):
    texts, references = ["the cat sat on it", "a dog"], [["the cat sat here", "the cat sat on"], ["a dog ate", "dogs"]]
    want = getattr(sacrebleu, direct)(texts, [list(column) for column in zip(*references, strict=True)]).score
    assert getattr(scores, name)(texts, references) == pytest.approx(want, abs=1e-9)
    shown = scores.signature(name, references)
    assert "nrefs:2|case:mixed" in shown
    assert f"version:{sacrebleu.__version__}" in shown


def test_signature_says_what_was_done():
    assert "nrefs:var|case:lc|eff:no|tok:13a|smooth:exp" in scores.signature("bleu", REFERENCES, lowercase=True)
    assert "nrefs:1|case:mixed|eff:yes|nc:6|nw:0" in scores.signature("chrf", [["a"]])


def test_rouge():
    found = scores.rouge(TEXTS, REFERENCES)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for kind in ("rouge1", "rouge2", "rougeL"):
        best = [
            max(scorer.score(r, text)[kind].fmeasure for r in row) for text, row in zip(TEXTS, REFERENCES, strict=True)
        ]
        assert found[kind] == pytest.approx(sum(best) / len(best), abs=1e-12)
    assert list(found) == ["rouge1", "rouge2", "rougeL"]
    assert scores.rouge(["running"], [["it runs"]])["rouge1"] == pytest.approx(2 / 3)  # stems: P = 1, R = 1/2


# --- SARI


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("About 95 you now get in.", 26.953601953601954),  # the metric card of Hugging Face `evaluate`
        ("About 95 species are now agreed.", 61.709656084656075),  # its issue 376
    ],
)
def test_sari_as_published(text, score):
    assert scores.sari([text], [ACCEPTED], [SPECIES]) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("source", "text", "references", "terms"),
    [
        # 1-grams: kept a b, to keep a c: 1/2 and 1/2; deleted c, which is wanted: 0; added x, to add x y: 1 and 1/2.
        # 2-grams: kept ab, to keep none: 0 and 0/0; deleted bc, well; added bx, to add ac cx xy: 0. 3-grams: kept none,
        # to keep none; deleted abc, well; added abx, to add acx cxy: 0. 4-grams: added none, to add acxy: 0/0 and 0.
        ("a b c", "a b x", ["a c x y"], [(1 / 2, 0, 2 / 3), (0, 1, 0), (1, 1, 0), (1, 1, 0)]),
        # Two references, so source and text count twice. 1-grams: a2 b2 before, a2 after, wanted a1 b2: kept a2, of
        # which 1 is wanted, of 3 in all: 1/2 and 1/3; deleted b2, which is wanted: 0; nothing to add. 2-grams: kept
        # none, to keep ab1: 0/0 and 0; deleted ab2, ab1 is wanted: 1/2.
        ("a b", "a", ["a b", "b"], [(2 / 5, 0, 1), (0, 1 / 2, 1), (1, 1, 1), (1, 1, 1)]),
        # What was said twice and is wanted once counts as wrongly deleted, in this convention: a1 deleted less a1.
        ("a a", "a", ["a"], [(1, 0, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)]),
        # An empty text is one empty token: added and not wanted.
        ("a", "", ["a"], [(0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)]),
        # Case does not count, punctuation is a token of its own.
        ("A.", "a .", ["A ."], [(1, 1, 1)] * 4),
    ],
    ids=["one", "two", "twice", "empty", "case"],
)
def test_sari_by_hand(source, text, references, terms):
    score = 100 * sum(map(sum, terms)) / 12
    assert scores.sari([text], [references], [source]) == pytest.approx(score, abs=1e-12)
    # And the mean over texts, another one of 100.
    assert scores.sari([text, "b"], [references, ["b"]], [source, "c"]) == pytest.approx((score + 100) / 2, abs=1e-12)


# --- distinct-n, by hand


def test_distinct():
    found = scores.distinct(["the cat sat the cat", "The cat.", "", "the cat sat"])
    # 1: the cat sat The cat. of 10; 2: the-cat cat-sat sat-the The-cat. of 7; 3: three and one seen again; 4: two.
    assert found == {"distinct1": 5 / 10, "distinct2": 4 / 7, "distinct3": 3 / 4, "distinct4": 1.0}
    assert set(scores.distinct(["", " "]).values()) == {0.0}
    assert scores.distinct(["a b"])["distinct3"] == 0.0


# --- Any texts


def test_identity():
    texts = ["the old king made good bread", "who is the queen of it all ?"]
    same = [(text, [text], "a cat") for text in texts]
    found = all_scores(same)
    assert all(found[name] == pytest.approx(1) for name in ("bleu", "chrf", "sari", "rouge1", "rouge2", "rougeL"))


@given(st.lists(st.permutations(WORDS[1:]), min_size=2, max_size=2))
def test_sari_of_the_reference_is_100(rows):
    source, text = (" ".join(words[:5]) for words in rows)  # no word twice
    assert scores.sari([text], [[text]], [source]) == pytest.approx(100)


@settings(deadline=None)
@given(samples, st.randoms(use_true_random=False))
def test_range_and_order(rows, rng):
    found = all_scores(rows)
    assert all(0 <= score <= 1 + 1e-9 for score in found.values()), found
    rng.shuffle(rows)
    assert all_scores(rows) == pytest.approx(found, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(samples, sentences)
def test_another_reference_does_not_hurt_rouge(rows, more):
    texts, references, _ = columns(rows)
    before, after = scores.rouge(texts, references), scores.rouge(texts, [[*row, more] for row in references])
    assert all(after[kind] >= before[kind] - 1e-12 for kind in before)


def test_texts_that_say_nothing():
    found = all_scores([("", ["the cat"], "the dog"), (" ", ["a"], "")])
    assert found.pop("sari") > 0  # most of its n-grams are of 0/0
    assert set(found.values()) == {0.0}


# --- Perplexity


CONTEXT = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two GPT-2 of random weights: one whose tokenizer puts texts between [CLS] and [SEP], one without such tokens."""
    transformers = pytest.importorskip("transformers", reason="comes with the extra `train`")
    from small import tokenizer

    found = {}
    for name, begin in (("begins", 2), ("bare", None)):
        torch.manual_seed(1)
        options = {"n_positions": CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": begin}
        config = transformers.GPT2Config(vocab_size=49, eos_token_id=3, initializer_range=0.5, **options)
        folder = tmp_path_factory.mktemp(name)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
        words = tokenizer(special=begin is not None, cls_token=None, bos_token="[CLS]" if begin else None)
        words.save_pretrained(folder)
        found[name] = folder
    return found


PLAIN = ["the baker made bread", "", "a", "who is the old queen of the town ?", "dog", "the cat is not a fish ."] * 2
PLAIN += ["go home", "the man made the king buy good milk", "see ?"]


def by_token(folder, text):
    """Negative log-likelihoods of a text's tokens, each from the tokens before it alone, in float64."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    network = GPT2LMHeadModel.from_pretrained(folder).double().eval()
    begin = network.config.bos_token_id
    tokens = ([] if begin is None else [begin]) + AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)[
        "input_ids"
    ]
    tokens = tokens[:CONTEXT]
    with torch.no_grad():
        logits = [network(input_ids=torch.tensor([tokens[:n]])).logits[0, -1] for n in range(1, len(tokens))]
    return [-float(row.log_softmax(-1)[token]) for row, token in zip(logits, tokens[1:], strict=True)]


@pytest.mark.parametrize("name", ["begins", "bare"])
def test_perplexity_token_by_token(name, folders):
    surprise = [value for text in PLAIN for value in by_token(folders[name], text)]
    words = [len(text.split()) for text in PLAIN]
    assert len(surprise) == sum(words) if name == "begins" else sum(count - 1 for count in words if count)
    want = math.exp(sum(surprise) / len(surprise))
    assert scores.perplexity(PLAIN, folders[name]) == pytest.approx(want, rel=1e-5)
    assert want > 60  # far from the 49 of a model that knows nothing: padding that is looked at would show


def test_perplexity_one_at_a_time(folders):
    together = math.log(scores.perplexity(PLAIN, folders["begins"]))
    alone = [(len(text.split()), text) for text in PLAIN if text]
    each = sum(count * math.log(scores.perplexity([text], folders["begins"])) for count, text in alone)
    assert together == pytest.approx(each / sum(count for count, _ in alone), rel=1e-5)
    assert scores.perplexity(PLAIN[::-1], folders["begins"]) == pytest.approx(math.exp(together), rel=1e-5)


def test_perplexity_never_holds_all_logits(folders, monkeypatch):
    from transformers import GPT2LMHeadModel

    sizes, forward = [], GPT2LMHeadModel.forward

    def spy(self, **inputs):
        sizes.append(tuple(inputs["input_ids"].shape))
        assert inputs["attention_mask"].sum() < inputs["attention_mask"].numel() or len(sizes) != 2
        assert not torch.is_grad_enabled()
        return forward(self, **inputs)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", spy)
    scores.perplexity(PLAIN, folders["begins"])
    assert [rows for rows, _ in sizes] == [scores.BATCH, 5]
    assert sizes[0][1] < sizes[1][1] == 1 + 9  # the short ones together


def test_perplexity_of_a_text_that_is_too_long_or_has_no_token(folders):
    text = " ".join(["the baker made bread"] * 5)
    surprise = by_token(folders["begins"], text)
    assert len(surprise) == CONTEXT - 1
    want = math.exp(sum(surprise) / len(surprise))
    assert scores.perplexity([text], folders["begins"]) == pytest.approx(want, rel=1e-5)
    assert math.isnan(scores.perplexity(["", ""], folders["begins"]))
    assert math.isnan(scores.perplexity(["dog", ""], folders["bare"]))


# --- BERTScore and MAUVE: what they are called with


def package(monkeypatch, name, **members):
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


class Scorer:
    """As bert_score's: F1 is a tenth per letter of the text, plus the number of references."""

    def __init__(self, model_type, num_layers):
        self.made, self._tokenizer = (model_type, num_layers), SimpleNamespace(model_max_length=10**30)

    def score(self, texts, references):
        assert texts
        assert all(texts)
        assert all(all(row) and row for row in references)
        f1 = torch.tensor([len(t) / 10 + len(row) for t, row in zip(texts, references, strict=True)])
        return torch.zeros(len(texts)), torch.ones(len(texts)), f1


@pytest.fixture
def bert(monkeypatch, tmp_path):
    scores._bert_scorer.cache_clear()
    package(monkeypatch, "bert_score", BERTScorer=Scorer)
    package(monkeypatch, "bert_score.utils", model2layers={"some/encoder": 7})
    (tmp_path / "encoder").mkdir()
    yield tmp_path / "encoder"
    scores._bert_scorer.cache_clear()


def test_bertscore(bert):
    texts, references = ["ab", "", "abc", "a"], [["x", ""], ["y"], ["z", "w"], [" "]]
    assert scores.bertscore(texts, references, bert) == pytest.approx((0.2 + 1 + 0.3 + 2) / 4)
    assert scores.bertscore(["", " "], [["a"], ["b"]], bert) == 0
    assert scores._bert_scorer(str(bert), None).made == (str(bert), 7)
    assert scores._bert_scorer(str(bert), 0).made == (str(bert), 0)
    assert scores._bert_scorer(str(bert), 3)._tokenizer.model_max_length == 512


def test_bertscore_of_an_unknown_model(bert):
    (bert.parent / "other").mkdir()
    with pytest.raises(ValueError, match=r"bertscore_layers must be given for a model .* got '.*other'"):
        scores.bertscore(["a"], [["b"]], bert.parent / "other")
    with pytest.raises(ValueError, match=r"bertscore_model must be a folder, got 'nowhere'"):
        scores.bertscore(["a"], [["b"]], "nowhere")


def test_mauve(folders, monkeypatch):
    calls = []

    def compute_mauve(**options):
        calls.append(options)
        return SimpleNamespace(mauve=torch.tensor(0.25))

    package(monkeypatch, "mauve", compute_mauve=compute_mauve)
    assert scores.mauve(["a", "", " "], [["b", "c"], ["d"], [""]], folders["begins"]) == 0.25
    assert calls[0]["p_text"] == ["b", "d", "[SEP]"]
    assert calls[0]["q_text"] == ["a", "[SEP]", "[SEP]"]
    assert calls[0]["featurize_model_name"] == str(folders["begins"])
    with pytest.raises(ValueError, match=r"mauve_model must be a folder, got 'nowhere'"):
        scores.mauve(["a"], [["b"]], "nowhere")


# --- The table, and what is wrong


def test_every_metric_of_the_table_runs_by_keyword(folders, bert, monkeypatch):
    package(monkeypatch, "mauve", compute_mauve=lambda **_: SimpleNamespace(mauve=0.5))
    models = {"perplexity": folders["begins"], "bertscore": bert, "mauve": folders["begins"]}
    given = {"references": [["a cat"], ["a dog"]], "sources": ["the cat", "the dog"]}
    for name, metric in scores.METRICS.items():
        assert scores.missing(name) is None
        keywords = {need: models[name] if need == "model" else given[need] for need in metric.needs}
        found = metric.compute(["the cat is", "the dog is"], **keywords)
        values = found.values() if isinstance(found, dict) else [found]
        assert all(isinstance(value, float) for value in values), name


def test_what_a_package_lacks_itself(monkeypatch, tmp_path):
    (tmp_path / "mauve.py").write_text("import faiss_that_is_not_here")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mauve", raising=False)
    assert scores.missing("mauve") == "it needs the package faiss_that_is_not_here: pip install mauve-text"
    monkeypatch.setattr(scores, "version", str.upper)
    assert scores.package_version("mauve") == "MAUVE-TEXT"


def test_what_is_missing(monkeypatch):
    for module in ("sacrebleu", "rouge_score", "bert_score", "mauve", "transformers"):
        monkeypatch.setitem(sys.modules, module, None)
    said = {name: scores.missing(name) for name in scores.METRICS}
    assert said.pop("distinct") is None
    assert said["rouge"] == "it needs the package rouge_score: pip install '.[evaluate]' in a clone of smoothie-kernels"
    assert said["bleu"] == said["chrf"] == said["sari"]
    assert (
        said["perplexity"] == "it needs the package transformers: pip install '.[train]' in a clone of smoothie-kernels"
    )
    assert said["bertscore"] == "it needs the package bert_score: pip install bert_score"
    assert said["mauve"] == "it needs the package mauve: pip install mauve-text"
    assert scores.package_version("no such package") == "unknown"
    assert scores.package_version("sacrebleu") == sacrebleu.__version__


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scores.distinct([]), "texts must be at least one, got none"),
        (lambda: scores.bleu([], []), "texts must be at least one, got none"),
        (lambda: scores.chrf(["a"], []), "references must be as many as texts, 1, got 0"),
        (lambda: scores.rouge(["a"], [["b"], ["c"]]), "references must be as many as texts, 1, got 2"),
        (lambda: scores.sari(["a"], [["b"]], []), "sources must be as many as texts, 1, got 0"),
        (lambda: scores.bleu(["a"], ["b"]), "references must be a list of at least one string for each text"),
        (lambda: scores.rouge(["a", "b"], [["b"], []]), "references must be a list of at least one string for each"),
        (lambda: scores.bertscore([], [], "x"), "texts must be at least one"),
        (lambda: scores.mauve(["a"], [[]], "x"), "references must be a list of at least one"),
        (lambda: scores.perplexity([], "x"), "texts must be at least one"),
        (lambda: scores.perplexity(["a"], "no/model"), "perplexity_model must be a causal model .* got 'no/model': "),
    ],
)
def test_messages(call, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", SimpleNamespace(compute_mauve=None))
    with pytest.raises(ValueError, match=message):
        call()


def test_order_of_texts_does_not_move_a_corpus_score():
    """Of more texts than fit a batch, and with references that come in another order."""
    rows = [(f"the cat sat {n}", [f"the cat {n} sat", "a"], f"the {n}") for n in range(20)]
    before = all_scores(rows)
    random.Random(0).shuffle(rows)
    assert all_scores([(text, row[::-1], source) for text, row, source in rows]) == pytest.approx(before, abs=1e-9)
