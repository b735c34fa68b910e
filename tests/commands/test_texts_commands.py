"""Texts on the command line: ``crp mine``, ``crp status``, and what is made of a folder alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from command_cases import crp, place_with_module
from PIL import Image

from crp.attribution import CondAttribution
from crp.attributors.explaining import explain
from crp.composites import AttnLRP
from crp.concepts import AxisConcept
from crp.errors import LoadingError
from crp.image import TextHeatmap
from crp.outputs import Position
from crp.visualization import FeatureVisualization, Table, Texts
from crp.visualization.sources import load_texts, load_tokenizer

pytest.importorskip("transformers")

MODULE = """
import torch, transformers
from text_cases import Letters, texts_of_ids

def net():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=16, use_cache=False)
    return transformers.GPT2LMHeadModel(config)

def reader():
    torch.manual_seed(0)
    own = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "num_labels": 3}
    config = transformers.BertConfig(vocab_size=11, hidden_size=8, max_position_embeddings=32, **own)
    return transformers.BertForSequenceClassification(config)

def translator():
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)

def listener():
    own = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    config = transformers.WhisperConfig(vocab_size=11, d_model=12, encoder_layers=1, decoder_layers=1, **own)
    return transformers.WhisperForConditionalGeneration(config)

def letters(): return Letters()
def ids(): return texts_of_ids(10)
def words(): return [{"words": word, "class": 2 + i} for i, word in enumerate(["abc d", "ee", "h fg", "aa"])]
def prose(): return ["abc d", "ee", "h fg", "aa"]
def numbers(): return torch.ones(4, 3)
"""
MINE = [
    "mine", "--model", "reading:net", "--layers", "*.mlp.act", "--layers", "transformer.h.1.ln_2:heads=2",
    "--composite", "attn_lrp", "--quiet",
]  # fmt: skip
OF_WORDS = ["--data", "reading:words", "--fields", "words,class", "--tokenizer", "reading:letters", "--position", "-1"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return place_with_module(tmp_path, monkeypatch, "reading", MODULE)


def test_texts_are_mined_and_opened_with_the_folder_alone(here: Path) -> None:
    result = crp(*MINE, *OF_WORDS, "--out", "a", "--stop", "3")
    assert result.exit_code == 0, result.output
    assert crp("mine", "--out", "a", "--quiet").output == "4 of 4 samples, 4 rows; complete\n"
    status = crp("status", "a")
    assert status.exit_code == 0 and "texts      tokenizer text_cases.Letters, 11 words; position -1" in status.output
    table = Table.open("a")
    assert table.rows().target.tolist() == [2, 3, 4, 5]
    assert list(table.layers) == ["transformer.h.0.mlp.act", "transformer.h.1.ln_2", "transformer.h.1.mlp.act"]
    assert [table.n_concepts(layer) for layer in table.layers] == [32, 2, 32]
    fv = FeatureVisualization.open("a")
    assert isinstance(fv.dataset, Texts) and repr(fv.layer_map["transformer.h.1.ln_2"]) == repr(AxisConcept(-1, 2))
    (texts,) = fv.get_max_reference(
        1, "transformer.h.1.ln_2", "relevance", (0, 2), AttnLRP(), init="relevance"
    ).values()
    assert isinstance(texts[0], TextHeatmap) and str(texts[0]) in {">abc d", ">ee", ">h fg", ">aa"}


@pytest.mark.parametrize("model", ["net", "reader"])
def test_layers_of_a_model_that_reads_tokens_are_listed_and_chosen(here: Path, model: str) -> None:
    listed = crp("layers", f"reading:{model}", "--json")
    assert listed.exit_code == 0, listed.output
    found = {one["name"]: one for one in json.loads(listed.output)}
    suggested = [name for name, one in found.items() if one["suggested"]]
    assert suggested and all(".act" in name or name.endswith("_act_fn") for name in suggested)
    assert all(found[name]["shape"][0] == 5 for name in suggested)  # (tokens of a short text)
    position = ["--position", "-1"] if model == "net" else ["--targets", "prediction"]
    words = ["--data", "reading:words", "--fields", "words,class", "--tokenizer", "reading:letters", *position]
    result = crp("mine", "--model", f"reading:{model}", *words, "--layers", "auto", "--quiet", "--out", model)
    assert result.exit_code == 0, result.output
    assert list(Table.open(model).layers) == suggested


def test_layers_of_both_texts_are_listed_where_a_model_has_a_decoder(here: Path) -> None:
    listed = crp("layers", "reading:translator", "--json")
    assert listed.exit_code == 0, listed.output
    found = {one["name"]: one for one in json.loads(listed.output)}
    parts = [("encoder.block", 1), ("decoder.block", 2)]
    wanted = [f"{part}.{i}.layer.{n}.DenseReluDense.act" for part, n in parts for i in (0, 1)]
    assert [name for name, one in found.items() if one["suggested"]] == wanted
    assert found["lm_head"]["shape"] == [5, 11]


def test_a_model_of_sounds_says_what_it_takes(here: Path) -> None:
    result = crp("layers", "reading:listener")
    assert result.exit_code == 1
    assert "takes 'input_features', and neither pictures nor ids of tokens" in result.output
    words = "--tokenizer", "reading:letters", "--text", "abc", "--out", "a.html"
    assert crp("attribute", "--model", "reading:listener", *words).output == result.output


@pytest.mark.parametrize("model", ["net", "reader"])
def test_who_gives_pictures_to_a_model_that_reads_texts_is_told_how_these_are_given(here: Path, model: str) -> None:
    Image.new("RGB", (4, 4)).save("picture.png")
    result = crp("attribute", "picture.png", "--model", f"reading:{model}", "--out", "a.html")
    assert result.exit_code == 1
    assert "; texts are given by --text, or by --data and --tokenizer" in result.output
    assert model == "net" or "cannot take samples of shape (1, 3, 4, 4): too many values" in result.output
    assert "--size" not in result.output


def test_ids_and_prose_are_texts_too(here: Path) -> None:
    for number, (words, n) in enumerate(
        [
            (["--data", "reading:ids", "--position", "-1", "--targets", "prediction"], 10),
            (["--data", "reading:prose", "--tokenizer", "reading:letters", "--position", "each"], 13),
        ]
    ):
        result = crp(*MINE, *words, "--out", str(number))
        assert result.exit_code == 0, result.output
        assert result.output == f"{n} of {n} samples, {n} rows; complete\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--data", "reading:words", "--tokenizer", "reading:letters", "--position", "last"],
            "--position last must be 'e",
        ),
        (["--data", "reading:words", "--tokenizer", "reading:nothing"], "reading has no 'nothing'"),
        (["--data", "reading:words", "--tokenizer", "."], "--tokenizer . cannot be loaded"),
        (
            [*OF_WORDS, "--layers", "*.ln_2:heads=0"],
            "*.ln_2:heads=0: behind the colon must be heads=N, such as heads",
        ),
        ([*OF_WORDS, "--layers", "*.ln_2:axis=1"], "*.ln_2:axis=1: behind the colon must be heads=N, such as heads=12"),
        ([*OF_WORDS, "--fields", "a,b,c"], "--fields names text and label, not 3 fields"),
        ([*OF_WORDS, "--size", "8"], "--size: this dataset gives tensors"),
        (["--data", ".", "--position", "-1"], "and --data is a folder of pictures"),
        (["--data", "reading:ids"], "needs an output of shape|text_target"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(here: Path, words: list[str], message: str) -> None:
    result = crp(*MINE, *words, "--out", "a", *(["--targets", "prediction"] if "reading:ids" in words else []))
    assert result.exit_code == 1 and result.output.startswith("Error: ")
    assert any(part in result.output for part in message.split("|")), result.output
    assert not (here / "a" / "shards").exists() or not list((here / "a" / "shards").iterdir())


def test_a_model_and_a_tokenizer_in_a_folder(here: Path) -> None:
    import reading  # type: ignore[import-not-found]
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate("?abcdefgh_")}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    net = reading.net()
    net.save_pretrained("saved")
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?").save_pretrained("saved")
    words = [*MINE, "--data", "reading:prose", "--position", "each", "--out", "a"]
    words[words.index("reading:net")] = "hf:saved"
    result = crp(*words)
    assert result.exit_code == 0 and "9 of 9 samples, 9 rows; complete" in result.output, result.output
    fv = FeatureVisualization.open("a")
    assert fv.dataset.words(0).words == tuple("abc d")
    assert "tokenizer saved, 10 words; position each" in crp("status", "a").output
    with torch.no_grad():
        ids = torch.tensor([[1, 2]])
        torch.testing.assert_close(fv.attribution.model(ids).logits, net.eval()(ids).logits)


def test_texts_made_by_the_user_say_everything_themselves(here: Path) -> None:
    texts = Texts([[3, 4]], position=-1)
    assert load_texts(texts, None, None, "", "m:n") is texts
    with pytest.raises(LoadingError, match="--position is said by the Texts that --data gives"):
        load_texts(texts, None, "-1", "", "m:n")
    assert load_texts([torch.ones(3)], None, None, "", "m:n") is None
    assert type(load_tokenizer("reading:letters")).__name__ == "Letters"


# --- crp attribute --------------------------------------------------------------------------------------------------

EXPLAIN = ["attribute", "--model", "reading:net", "--tokenizer", "reading:letters", "--method", "attn_lrp"]


def test_a_text_is_explained_on_a_page(here: Path) -> None:
    result = crp(*EXPLAIN, "--text", "abc d", "--text", "ee", "--target", "h", "--out", "why.html")
    assert result.exit_code == 0, result.output
    *said, wrote = result.output.splitlines()
    assert wrote == "wrote why.html" and [line.split(": ")[0] for line in said] == ["abc d", "ee"]
    page = Path("why.html").read_text(encoding="utf-8")
    assert "explained: &#x27;h&#x27;" in page and page.count("<p style=") == 2 and page.count("<span style=") == 9
    result = crp(
        *EXPLAIN, "--text", "abc d", "--target", "#9", "--against", "b", "--position", "2", "--json", "--out", "a.html"
    )
    facts = json.loads(result.output)
    assert facts["explained"]["token"] == 9 and facts["position"] == 2 and facts["against"] == 3
    assert [word for word, _ in facts["tokens"]] == [">", "a", "b", "c", " ", "d"]
    import reading

    net, data = reading.net().eval(), reading.Letters()("abc d")
    wanted = CondAttribution(net)(
        {name: torch.tensor([field]) for name, field in data.items()}, [{"y": Position(2, 9, against=3)}], AttnLRP()
    ).heatmap[0]
    torch.testing.assert_close(torch.tensor([value for _, value in facts["tokens"]]), wanted, rtol=1e-4, atol=1e-6)


def test_the_first_token_can_be_left_out_of_the_colours(here: Path) -> None:
    explained = [*EXPLAIN, "--text", "abc d", "--target", "f", "--position", "1", "--out", "why.html"]

    def colours() -> list[float]:
        return [float(each) for each in re.findall(r"background:rgba\([\d,]+,([\d.]+)\)", Path("why.html").read_text())]

    assert crp(*explained).exit_code == 0
    first, second, *_ = colours()
    assert crp(*explained, "--scale-without-first").exit_code == 0
    assert colours()[:2] == [first, first] and first > second
    assert "in colours of the tokens behind the first" in Path("why.html").read_text()


def test_heads_classes_and_figures(here: Path) -> None:
    layer = ["--layer", "transformer.h.1.attn.c_proj.input:heads=2", "--text", "abc d", "--json"]
    parts = []
    for concepts in (["0"], ["1"], ["0", "1"], ["-1"]):
        given = [word for concept in concepts for word in ("--concept", concept)]
        result = crp(*EXPLAIN, *layer, *given, "--out", "a.png")
        assert result.exit_code == 0, result.output
        parts.append(torch.tensor([value for _, value in json.loads(result.output)["tokens"]]))
    torch.testing.assert_close(parts[0] + parts[1], parts[2], rtol=1e-4, atol=1e-6)
    assert torch.equal(parts[3], parts[1])  # (-1 is the last)
    with Image.open("a.png") as figure:
        assert figure.width > 500
    result = crp(*EXPLAIN, *layer, "--out", "a.png")
    assert result.exit_code == 1 and "heads=2 names concepts, of which none is explained; give --con" in result.output
    classes = ["attribute", "--model", "reading:reader", "--tokenizer", "reading:letters", "--method", "cp_lrp"]
    result = crp(*classes, "--text", "abc", "--target", "2", "--out", "b.svg")
    assert result.exit_code == 0 and "class 2 (" in result.output, result.output
    n = len(json.loads(crp(*classes, "--text", "abc", "--target", "-1", "--json", "--out", "c.svg").output)["tokens"])
    assert n == 4
    result = crp(*classes, "--text", "abc", "--target", "10", "--out", "d.svg")
    assert result.exit_code == 1 and "--target 10: the model has the classes 0 to " in result.output, result.output
    for option in (["--position", "1"], ["--against", "b"]):
        result = crp(*classes, "--text", "abc", *option, "--out", "e.svg")
        assert result.exit_code == 1 and "--position and --against are for language models" in result.output
    own = crp(*EXPLAIN, "--layer", "transformer.h.0", "--text", "abc", "--json", "--out", "a.html")
    facts = json.loads(own.output)
    import reading  # type: ignore[import-not-found]

    data = {name: torch.tensor([field]) for name, field in reading.Letters()("abc").items()}
    at = Position(3, facts["explained"]["token"])
    wanted = explain("attn_lrp", reading.net().eval(), data, at, layer="transformer.h.0")
    torch.testing.assert_close(
        torch.tensor([value for _, value in facts["tokens"]]), wanted[0].sum(-1), rtol=1e-4, atol=1e-6
    )
    (here / "f.html").mkdir()
    result = crp(*EXPLAIN, "--text", "abc", "--out", "f.html")
    assert result.exit_code == 1 and "f.html" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "a.html"], "give pictures, or --text"),
        (["--text", "ab", "--out", "a.gif"], "--out a.gif must end in .html, .png"),
        (["--text", "ab", "--target", "ab", "--out", "a.html"], "--target 'ab' is 2 tokens (#2 'a', #3 'b'); name one"),
        (["--text", "ab", "--target", "#11", "--out", "a.html"], "the model has the tokens #0 to #10"),
        (
            ["--text", "ab", "--position", "3", "--out", "a.html"],
            "--position 3 must be a token of the text, which has 3",
        ),
        (["--text", "ab", "--concept", "3", "--out", "a.html"], "--concept needs the --layer"),
        (["--text", "ab", "--layer", "*.mlp.act", "--out", "a.html"], "--layer *.mlp.act names 2 layers; name one"),
        (["--text", "ab", "--layer", "nowhere", "--out", "a.html"], "nowhere"),
        (["--text", "ab", "--option", "target=1", "--out", "a.html"], "is no option of a method; give --target"),
        (
            ["--text", "ab", "--layer", "transformer.h.0", "--option", "layer=transformer.h.1", "--out", "a.html"],
            "--option layer and --layer, or --concept, say both what is explained; give one",
        ),
        (["--text", "xyz", "--out", "a.html"], "substring not found"),
        (["--text", "ab", "--classes", "names", "--out", "a.html"], "names 2 classes, and the model has 11 outputs"),
    ],
)
def test_what_cannot_be_explained(here: Path, words: list[str], message: str) -> None:
    (here / "names").write_text("one\ntwo")
    result = crp(*EXPLAIN[:5], *(EXPLAIN[5:] if "--text" in words else []), *words)
    assert result.exit_code == 1 and message in result.output, result.output
    assert not Path("a.html").exists()
