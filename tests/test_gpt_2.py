"""What a user's script sees: the public functions on a tiny model."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import gpt_2_simple as gpt2
from gpt_2_simple import session
from gpt_2_simple.common import folders, locks
from gpt_2_simple.common.published import MODEL_FILES
from gpt_2_simple.data import dataset
from gpt_2_simple.storage import create, load

RUN = {"model_name": "tiny", "sample_every": 0, "learning_rate": 0.01, "batch_size": 4}


def finetune(sess, dataset="text.txt", **changes):
    return gpt2.finetune(sess, dataset, **{**RUN, "steps": 3, "seed": 1, **changes})


def texts(sess, **changes):
    return gpt2.generate(sess, return_as_list=True, **{"length": 12, "seed": 5, **changes})


@pytest.fixture
def loaded(workplace, sess):
    """A session that holds models/tiny."""
    gpt2.load_gpt2(sess, model_name="tiny", verbose=0)
    return sess


def test_finetune_load_generate(workplace, sess, capsys):
    result = gpt2.finetune(
        sess, "text.txt", model_name="tiny", steps=30, batch_size=8, accumulate_gradients=2,
        learning_rate=0.01, sample_every=20, sample_length=10, save_every=20, print_every=10,
        seed=2,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "Loading checkpoint models/tiny/model.ckpt\n" in out
    size = os.path.getsize("text.txt") + 1  # bytes are tokens here, as is <|endoftext|>
    assert f"Loading dataset...\ndataset has {size} tokens\n" in out
    assert "Training...\n" in out
    assert re.search(r"^\[10 \| \d+\.\d\d\] loss=\d\.\d\d avg=\d\.\d\d$", out, re.MULTILINE)
    assert "======== SAMPLE 1 ========\n" in out
    assert "Saving checkpoint/run1/model-20\n" in out
    assert "Saving checkpoint/run1/model-30\n" in out
    assert os.listdir("samples/run1") == ["samples-21"]
    assert result.step == 30
    assert result.loss < 4 < 5.5 < result.history[0].loss
    assert result.checkpoint == "checkpoint/run1/model-30"

    gpt2.generate(sess, length=20, seed=1)
    first = capsys.readouterr().out
    with gpt2.start_tf_sess() as another:
        gpt2.load_gpt2(another)
        assert capsys.readouterr().out == "Loading checkpoint checkpoint/run1/model-30\n"
        gpt2.generate(another, length=20, seed=1)
    assert capsys.readouterr().out == first
    assert len(first) > 10


def test_run_folder_has_the_files_of_0_8_1(workplace, sess):
    finetune(sess, run_name="mine")
    files = set(os.listdir("checkpoint/mine"))
    assert {
        "checkpoint", "counter", "encoder.json", "hparams.json", "vocab.bpe",
        "model-3.data-00000-of-00001", "model-3.index", "model-3.meta",
    } <= files  # fmt: skip
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert tf.train.latest_checkpoint("checkpoint/mine") == "checkpoint/mine/model-3"
    names = dict(tf.train.list_variables("checkpoint/mine"))
    assert all(name.startswith("model/") for name in names)
    assert names["model/h1/attn/c_attn/w"] == [1, 16, 48]


def test_accumulation_equals_one_large_batch(workplace):
    def weights(**changes):
        with gpt2.start_tf_sess(threads=1) as sess:
            result = finetune(sess, steps=4, run_name="a", restore_from="fresh", **changes)
            reader = tf.train.load_checkpoint(result.checkpoint)
        return [h.loss for h in result.history], reader.get_tensor("model/h0/mlp/c_fc/w")

    losses, large = weights(batch_size=6, accumulate_gradients=1)
    small_losses, small = weights(batch_size=2, accumulate_gradients=3)
    np.testing.assert_allclose(losses, small_losses, rtol=1e-5)
    np.testing.assert_allclose(large, small, rtol=1e-3, atol=2e-5)


def test_only_train_transformer_layers(workplace, sess):
    before = tf.train.load_checkpoint("models/tiny")
    result = finetune(sess, only_train_transformer_layers=True)
    after = tf.train.load_checkpoint(result.checkpoint)
    for name in before.get_variable_to_shape_map():
        same = np.array_equal(before.get_tensor(name), after.get_tensor(name))
        assert same is not name.startswith("model/h"), name


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adafactor"])
def test_every_optimizer_lowers_the_loss(workplace, sess, optimizer):
    result = finetune(sess, steps=15, optimizer=optimizer, accumulate_gradients=1,
                      learning_rate=0.5 if optimizer == "sgd" else 0.02)  # fmt: skip
    assert result.history[-1].loss < result.history[0].loss - 0.5


def test_second_finetune_in_a_session_adds_no_operations(workplace, sess):
    finetune(sess)
    count = len(sess.graph.get_operations())
    finetune(sess)
    assert len(sess.graph.get_operations()) == count


def test_two_threads_generate_from_one_session(loaded):
    expected = {seed: texts(loaded, seed=seed) for seed in (1, 2)}
    found = {}

    def work(seed):
        found[seed] = [texts(loaded, seed=seed) for _ in range(3)]

    threads = [threading.Thread(target=work, args=[seed]) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: [text] * 3 for seed, text in expected.items()}


def test_hundred_generate_calls_add_no_operations(loaded):
    texts(loaded)
    count = len(loaded.graph.get_operations())
    for call in range(100):
        settings = {"temperature": 0.1 + call / 50, "top_k": call % 7, "top_p": call % 3 / 3}
        texts(loaded, seed=call, length=2 + call % 10, **settings)
    assert len(loaded.graph.get_operations()) == count


def test_same_seed_gives_the_same_text(loaded):
    first = texts(loaded, nsamples=4, batch_size=2)
    assert texts(loaded, nsamples=4, batch_size=2) == first
    assert texts(loaded, nsamples=4, batch_size=4) == first
    assert len(set(first)) > 1
    assert texts(loaded, seed=None) != texts(loaded, seed=None)


@pytest.mark.parametrize("prefix", ["Once", "\n\nHello", "naïve ✓ 日本", "<|startoftext|>", " "])
def test_include_prefix(loaded, prefix):
    (with_it,) = texts(loaded, prefix=prefix)
    (without,) = texts(loaded, prefix=prefix, include_prefix=False)
    assert with_it.startswith(prefix)
    assert with_it[len(prefix) :].lstrip("\n") == without


def test_empty_prefix_equals_no_prefix(loaded):
    assert texts(loaded, prefix="") == texts(loaded)


def test_truncate_cuts_at_the_first_occurrence_after_the_prefix(loaded):
    (whole,) = texts(loaded, prefix="ab", temperature=0, length=20)
    end = whole[8]
    (cut,) = texts(loaded, prefix="ab", temperature=0, length=20, truncate=end)
    assert cut == "ab" + whole[2:].split(end)[0]
    (bare,) = texts(
        loaded, prefix="ab", temperature=0, length=20, truncate=end, include_prefix=False
    )
    assert bare == whole[2:].split(end)[0].lstrip("\n")
    # A prefix that holds the end itself is not cut.
    (kept,) = texts(loaded, prefix="a.b.c", truncate=".", length=5)
    assert kept.startswith("a.b.c")


def test_generate_prints_texts_with_sample_delim(loaded, capsys):
    gpt2.generate(loaded, nsamples=2, batch_size=2, length=5, seed=1, sample_delim="---\n")
    assert capsys.readouterr().out.count("---\n") == 2
    gpt2.generate(loaded, length=5, seed=1, sample_delim="---\n")
    assert "---" not in capsys.readouterr().out


def test_destination_path_writes_the_file_and_prints_nothing(loaded, capsys):
    expected = texts(loaded, nsamples=2, batch_size=2)
    gpt2.generate_to_file(
        loaded, destination_path="out.txt", nsamples=2, batch_size=2, length=12, seed=5
    )
    assert capsys.readouterr().out == ""
    delimiter = "=" * 20 + "\n"
    with open("out.txt", encoding="utf-8") as file:
        assert file.read() == "".join(f"{text}\n{delimiter}" for text in expected)
    assert not os.path.exists("out.txt.part")


def test_generate_uses_the_loaded_run_by_default(workplace, sess, capsys):
    finetune(sess, run_name="a", verbose=0)
    finetune(sess, run_name="b", restore_from="checkpoint/a", learning_rate=0.1, verbose=0)
    from_b = texts(sess, temperature=0)
    assert texts(sess, temperature=0, run_name="b") == from_b
    # The run was made from this model: scripts name it here and mean the run.
    assert texts(sess, temperature=0, model_name="tiny") == from_b
    capsys.readouterr()
    from_a = texts(sess, temperature=0, run_name="a")
    assert capsys.readouterr().out == "Loading checkpoint checkpoint/a/model-3\n"
    assert from_a != from_b


def test_finetune_reads_what_encode_dataset_wrote(workplace, sess):
    gpt2.encode_dataset("text.txt", out_path="text.npz", model_name="tiny")
    plain = finetune(sess, restore_from="fresh")
    encoded = finetune(sess, "text.npz", restore_from="fresh")
    assert [h.loss for h in plain.history] == [h.loss for h in encoded.history]


def test_encode_dataset_names_the_npz_that_it_writes(workplace, capsys):
    gpt2.encode_dataset("text.txt", out_path="x.txt", model_name="tiny")
    assert "Writing x.txt.npz\n" in capsys.readouterr().out
    assert os.path.exists("x.txt.npz")
    with pytest.raises(ValueError, match="'x.txt.npz' itself, which would be lost"):
        gpt2.encode_dataset(["x.txt.npz", "text.txt"], out_path="x.txt", model_name="tiny")


def test_finetune_csv_with_column_and_cache_dir(workplace, sess, capsys, monkeypatch):
    (workplace / "rows.csv").write_text("word,kind\nred,colour\ngreen,colour\n")

    def tokens(path="rows.csv", **options):
        finetune(sess, path, steps=1, restore_from="fresh", **options)
        return int(re.search(r"dataset has (\d+) tokens", capsys.readouterr().out)[1])

    marks = len("<|startoftext|>\n") + 1
    assert tokens() == tokens(header=True) == len("redgreen") + 2 * marks
    assert tokens(header=False, column=1) == len("kindcolourcolour") + 3 * marks
    read_as = {"template": "{0}={1}", "header": False}
    gpt2.encode_dataset("rows.csv", model_name="tiny", out_path="rows.tokens", **read_as)
    assert tokens("rows.tokens") == tokens(**read_as)

    for pad, chunks in [(False, 1), (True, 3)]:
        gpt2.encode_dataset("rows.csv", model_name="tiny", header=False, pad_documents=pad)
        with np.load("text_encoded.npz") as npz:
            assert len(npz.files) == chunks

    monkeypatch.setattr(dataset, "LARGE_BYTES", 10)
    monkeypatch.setattr(dataset, "core_count", lambda: 1)
    tokens(cache_dir="kept")
    (kept,) = os.listdir("kept")
    gpt2.encode_dataset("rows.csv", model_name="tiny", cache_dir="kept")
    assert os.listdir("kept") == [kept]


def test_script_for_0_8_1_runs(workplace, sess, capsys):
    """Arguments by position, in 0.8.1's order."""
    gpt2.finetune(
        sess, "text.txt", 2, "tiny", "models", 50000, 1, 0.0001, 5, "latest", "run1", "checkpoint",
        100, 31, 1, False, 1000, 1, 1, False, False, "adam", False, False,
    )  # fmt: skip
    gpt2.load_gpt2(sess, "latest", "run1", "checkpoint", None, "models", False, True)
    found = gpt2.generate(
        sess, "run1", "checkpoint", None, "models", "samples", True, "z", None, "=\n", "The", 1, 2,
        2, 9, 0.7, 3, 0.9, False,
    )  # fmt: skip
    assert len(found) == 2
    assert gpt2.encoder.get_encoder("checkpoint/run1").encode("hi") == [104, 105] or found
    assert gpt2.model.default_hparams().n_ctx == 1024


# --- what people get wrong ------------------------------------------------------------------------


def test_missing_model_error_names_download_gpt2(workplace, sess):
    with pytest.raises(FileNotFoundError, match=r"models there: tiny.*download_gpt2"):
        gpt2.finetune(sess, "text.txt", model_name="124M", steps=1)
    with pytest.raises(FileNotFoundError, match="download_gpt2"):
        gpt2.load_gpt2(sess, model_name="355M")
    assert not os.path.exists("checkpoint")


def test_model_name_in_lower_case_error_names_the_published_model(workplace, sess):
    with pytest.raises(FileNotFoundError, match=r"did you mean model_name='124M'\?"):
        gpt2.load_gpt2(sess, model_name="124m")


def test_missing_run_error_lists_the_runs(workplace, sess):
    finetune(sess, run_name="good")
    with pytest.raises(FileNotFoundError, match="runs there: good"):
        gpt2.load_gpt2(sess, run_name="bad")
    with pytest.raises(FileNotFoundError, match="model-3"):
        gpt2.load_gpt2(sess, run_name="good", checkpoint="model-99")


def stream(sess, *args, **options):
    return "".join(gpt2.generate_stream(sess, *args, **options))


USES = [
    gpt2.generate,
    gpt2.generate_to_file,
    stream,
    lambda sess: gpt2.score(sess, "text"),
    lambda sess: gpt2.next_token_probs(sess, "text"),
]


@pytest.mark.parametrize("use", USES)
def test_generating_without_a_loaded_model_is_an_error(workplace, sess, use):
    with pytest.raises(RuntimeError, match=r"no model yet: call gpt2\.load_gpt2\(sess\)"):
        use(sess)
    assert not os.path.exists("gpt_2_gen_texts.txt")


@pytest.mark.parametrize(
    "use",
    [*USES, lambda sess: gpt2.load_gpt2(sess, model_name="tiny"), lambda sess: finetune(sess)],
)
def test_closed_session_is_an_error(workplace, use):
    sess = gpt2.start_tf_sess()
    gpt2.load_gpt2(sess, model_name="tiny", verbose=0)
    sess.close()
    with pytest.raises(RuntimeError, match="closed; make another with start_tf_sess"):
        use(sess)
    assert not os.path.exists("checkpoint")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nsamples": 10, "batch_size": 3}, "nsamples=10 must be a multiple of batch_size=3"),
        ({"nsamples": 0}, "nsamples=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"length": 0}, "length=0"),
        ({"length": -5}, "length=-5"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": -0.1}, "top_p=-0.1"),
        ({"seed": "x"}, "seed='x' must be a whole number"),
        ({"seed": 1.5}, "seed=1.5 must be a whole number"),
        ({"prefix": []}, r"prefix=\[\] must hold at least one prefix"),
        ({"stop": ""}, r"stop=\[''\] holds an empty string; leave it out"),
        ({"stop": ["a", ""]}, r"stop=\['a', ''\] holds an empty string"),
        ({"min_length": 3}, "min_length=3 needs a stop_token to hold back"),
        (
            {"top_k": 2**31},
            r"top_k=2147483648 must be a whole number from 0 to 2147483647",
        ),
        ({"truncate": ["a"]}, r"truncate=\['a'\] must be a string; stop= takes several"),
        ({"prefix": 5}, "prefix=5 must be a string or a list of strings"),
        ({"prefix": ["a", None]}, r"prefix=\['a', None\] must be a string or"),
        ({"stop": 5}, "stop=5 must be a string or a list of strings"),
        ({"bad_words": 5}, "bad_words=5 must be a string or a list of strings"),
    ],
)
def test_generate_settings_out_of_range_raise_value_error(loaded, changes, message):
    with pytest.raises(ValueError, match=message):
        texts(loaded, **changes)
    if not {"nsamples", "batch_size"} & changes.keys():
        if changes.get("prefix"):
            message = "prefix=.* must be a string"
        with pytest.raises(ValueError, match=message):
            gpt2.generate_stream(loaded, **{"length": 5, **changes})  # before the first piece


def test_prefix_longer_than_the_context_stays_whole_in_the_text(loaded):
    prefix = "All work and no play makes Jack " * 157  # a byte is a token here
    prefix = prefix[:5000]
    message = "longer than the context of 32.* first 4980 tokens"
    with pytest.warns(UserWarning, match=message) as w:
        whole, again = texts(loaded, prefix=[prefix, "on"], batch_size=2)
    assert [warning.filename for warning in w] == [__file__]  # the user's line, not ours
    assert whole.startswith(prefix)
    assert again.startswith("on")
    assert whole[5000:] == texts(loaded, prefix=prefix[4980:])[0][20:]
    (found,) = gpt2.score(loaded, prefix)
    assert found.log_probabilities.shape == (5000,)
    assert np.isfinite(found.log_probabilities).all()


def test_min_length_holds_the_stop_token_back(loaded):
    first = gpt2.next_token_probs(loaded, "on")[0][0]
    options = {"prefix": "on", "temperature": 0, "include_prefix": False, "stop_token": first}
    assert texts(loaded, **options) == [""]
    (held,) = texts(loaded, **options, min_length=3)
    assert len(held) >= 3
    assert first not in held[:3]
    assert "".join(gpt2.generate_stream(
        loaded, "on", length=12, temperature=0, include_prefix=False, stop_token=first, min_length=3
    )).lstrip("\n") == held  # fmt: skip


def test_next_token_probs_prefix_must_be_a_string(loaded):
    with pytest.raises(ValueError, match="prefix=5 must be a string"):
        gpt2.next_token_probs(loaded, 5)


def test_stop_token_given_as_text(workplace, sess):
    gpt2.create_gpt2("text.txt", "words", n_layer=1, n_head=1, n_embd=8, n_ctx=16, vocab_size=300)
    gpt2.load_gpt2(sess, model_name="words", verbose=0)
    enc = gpt2.encoder.get_encoder("models/words")
    for text in ("\n", " ", enc.decode([280])):
        (token,) = enc.encode(text)
        found = gpt2.generate(sess, stop_token=text, length=8, seed=1, return_as_list=True)
        assert found == gpt2.generate(sess, stop_token=token, length=8, seed=1, return_as_list=True)
    with pytest.raises(ValueError, match="stop_token='é' is no token; give its id, or use stop="):
        gpt2.generate(sess, stop_token="é")  # two bytes; byte 0xE9 has this name in encoder.json


def test_stream_that_ends_at_once_gives_the_prefix(loaded, capsys):
    options = {"length": 9, "temperature": 0, "stop": gpt2.next_token_probs(loaded, "on", 1)[0][0]}
    assert texts(loaded, prefix="on", **options) == ["on"]
    assert list(gpt2.generate_stream(loaded, "on", **options)) == ["on"]
    assert list(gpt2.generate_stream(loaded, "on", include_prefix=False, **options)) == []
    gpt2.generate(loaded, prefix="on", stream=True, **options)
    assert capsys.readouterr().out == "on\n"


def test_named_run_is_loaded_by_generate(workplace, sess, capsys):
    for name in ("run1", "run2"):
        finetune(sess, run_name=name, learning_rate=0.01 if name == "run1" else 0.1)
    second = texts(sess)
    first = texts(sess, run_name="run1")
    assert first != second
    gpt2.load_gpt2(sess, run_name="run2")
    assert texts(sess) == second
    capsys.readouterr()
    assert texts(sess, run_name="run1", verbose=0) == first
    assert capsys.readouterr().out == ""
    gpt2.generate_to_file(sess, run_name="run2", seed=5, length=12)
    assert (workplace / "gpt_2_gen_texts.txt").read_text() == f"{second[0]}\n"
    gpt2.load_gpt2(sess, 3, run_name="run1")
    assert texts(sess) == first


def test_refused_finetune_leaves_no_run_folder(workplace, sess):
    gpt2.load_gpt2(sess, model_name="tiny", precision="bfloat16")
    with pytest.raises(ValueError, match="holds a model in bfloat16"):
        finetune(sess)
    assert not os.path.exists("checkpoint")


def test_destination_path_may_be_a_link_or_a_pipe(loaded, workplace):
    (workplace / "texts.txt").write_text("old")
    os.symlink("texts.txt", "link.txt")
    gpt2.generate_to_file(loaded, destination_path="link.txt", length=5, seed=1)
    assert os.path.islink("link.txt")
    expected = (workplace / "texts.txt").read_text()
    assert expected == texts(loaded, length=5, seed=1)[0] + "\n"
    os.mkfifo("pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((workplace / "pipe").read_text()))
    reader.start()
    gpt2.generate_to_file(loaded, destination_path="pipe", length=5, seed=1)
    reader.join(60)
    assert read == [expected]
    assert not os.path.isfile("pipe")


def test_score_texts_must_be_strings(loaded):
    with pytest.raises(ValueError, match="texts=5 must be a string or a list of strings"):
        gpt2.score(loaded, 5)


@pytest.mark.parametrize(
    "use",
    [*USES, lambda sess: gpt2.load_gpt2(sess, model_name="tiny"), lambda sess: finetune(sess)],
)
def test_wrong_session_argument_is_an_error(workplace, use):
    with pytest.raises(TypeError, match="sess=None is no session; make one with gpt2.start_tf_ses"):
        use(None)


def test_temperature_0_is_greedy_and_large_top_k_is_off(loaded):
    assert texts(loaded, temperature=0, seed=1) == texts(loaded, temperature=0, seed=2)
    assert texts(loaded, top_k=100000) == texts(loaded, top_k=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamw"}, "optimizer='adamw' must be one of"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"accumulate_gradients": 0}, "accumulate_gradients=0"),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"learning_rate": -0.1}, "learning_rate=-0.1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"steps": 0}, "steps=0"),
        ({"steps": -2}, "steps=-2"),
        ({"steps": "ten"}, "steps='ten'"),
        ({"save_every": 0}, "save_every=0"),
        ({"print_every": 0}, "print_every=0"),
        ({"sample_length": 0}, "sample_length=0"),
        ({"sample_num": -1}, "sample_num=-1"),
        ({"max_checkpoints": -1}, "max_checkpoints=-1"),
        ({"sequence_length": 1}, "sequence_length=1"),
    ],
)
def test_training_settings_out_of_range_are_refused_before_any_work(
    workplace, sess, changes, message
):
    with pytest.raises(ValueError, match=re.escape(message)):
        finetune(sess, **changes)
    assert not os.path.exists("checkpoint")


@pytest.mark.parametrize("name", ["dataset", "val_dataset"])
def test_missing_dataset_is_an_error_before_any_work(workplace, sess, name):
    with pytest.raises(FileNotFoundError, match=r"no dataset 'texd\.txt'.* mean 'text\.txt'\?"):
        finetune(sess, **{name: "texd.txt"})
    os.mkdir("folder")
    with pytest.raises(ValueError, match="the folder 'folder' holds no file"):
        finetune(sess, **{name: "folder"})
    assert not os.path.exists("checkpoint")


@pytest.mark.parametrize(
    ("path", "content", "options", "message"),
    [
        ("empty.txt", b"", {}, "the dataset 'empty.txt' is empty"),
        ("mark.txt", b"\xef\xbb\xbf", {}, "the dataset 'mark.txt' is empty"),
        ("data.npz", b"text", {}, "'data.npz' is not a dataset .* with encode_dataset"),
        (
            "data.npz",
            np.array([257]),
            {},
            "ids from 257 to 257; the model's vocabulary has 0 to 256",
        ),
        ("data.npz", np.zeros((2, 2)), {}, r"float64 \[2, 2\], not a row of token ids"),
        (
            "jokes.csv",
            b"ID,Joke\n1,ha\n",
            {"column": "joke"},
            "'jokes.csv' has no column 'joke': its columns are 'ID', 'Joke'",
        ),
    ],
)
def test_unusable_dataset_error_names_the_file(workplace, sess, path, content, options, message):
    if isinstance(content, np.ndarray):
        np.savez(path, content)
    else:
        (workplace / path).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        finetune(sess, path, **options)
    warned = contextlib.nullcontext()
    if options:  # the column is for the validation set alone
        warned = pytest.warns(UserWarning, match="'text.txt' is read as plain text, without column")
    with warned, pytest.raises(ValueError, match=message):
        finetune(sess, val_dataset=path, **options)


def test_folder_without_text_is_an_error(workplace, sess):
    os.mkdir("pictures")
    (workplace / "pictures" / "a.png").write_bytes(b"\x89PNG\0\0")
    with (
        pytest.warns(UserWarning, match=r"a\.png' is not UTF-8 text and was left out"),
        pytest.raises(ValueError, match="the dataset 'pictures' is empty: there is no text"),
    ):
        finetune(sess, "pictures")


@pytest.mark.parametrize(
    ("content", "tokens", "options"),
    [
        (b"\xef\xbb\xbfan editor's mark", 16, {}),
        ("déjà vu".encode("latin-1"), 9, {"encoding": "latin-1"}),
        (b"word " * 1_000_000, 5_000_000, {}),
    ],
)
def test_finetune_on_unusual_text(workplace, sess, capsys, content, tokens, options):
    (workplace / "some.txt").write_bytes(content)
    assert finetune(sess, "some.txt", steps=1, **options).step == 1
    end = tokens < 50000  # <|endoftext|>
    assert f"dataset has {tokens + end} tokens\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["run1/", "./run1", "deep/../run1", ""])
def test_resume_with_another_spelling_of_the_run_folder(workplace, sess, name):
    os.makedirs("checkpoint/deep")
    finetune(sess, run_name="run1" if name else "", seed=None)
    assert finetune(sess, run_name=name, seed=None).step == 6


def test_samples_of_runs_with_equal_last_names_do_not_collide(workplace, sess):
    for name in ("a/poems", "b/poems"):
        finetune(sess, run_name=name, steps=2, sample_every=1, sample_length=3)
        assert os.path.isfile(f"samples/{name}/samples-2")


def test_run_name_with_brackets(workplace, sess):
    finetune(sess, run_name="run[1]")
    assert finetune(sess, run_name="run[1]").step == 6
    gpt2.load_gpt2(sess, run_name="run[1]")


def test_run_without_a_whole_checkpoint_is_not_overwritten(workplace, sess):
    finetune(sess)
    data = "checkpoint/run1/model-3.data-00000-of-00001"
    os.truncate(data, os.path.getsize(data) - 100)
    with pytest.raises(FileNotFoundError, match="no whole checkpoint.* restore_from='fresh'"):
        finetune(sess)
    os.remove("checkpoint/run1/checkpoint")
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        finetune(sess)
    assert finetune(sess, restore_from="fresh").step == 3


def test_failed_load_leaves_no_mixed_weights(workplace, sess):
    finetune(sess, run_name="good")
    finetune(sess, run_name="bad", learning_rate=1.0)
    expected = texts(sess, run_name="good", temperature=0)
    data = "checkpoint/bad/model-3.data-00000-of-00001"
    with open(data, "r+b") as file:
        file.seek(os.path.getsize(data) // 2)
        file.write(b"!")
    with pytest.raises(ValueError, match="is damaged"):
        gpt2.load_gpt2(sess, run_name="bad")
    with pytest.raises(RuntimeError, match="no model yet"):
        texts(sess)
    assert texts(sess, run_name="good", temperature=0) == expected


def test_checkpoint_replaced_while_loading_is_loaded_again(workplace, sess, monkeypatch):
    finetune(sess)
    index = "checkpoint/run1/model-3.index"
    run, seen = sess.run, []

    def run_and_replace(fetches, feed=None):
        found = run(fetches, feed)
        if not seen:
            shutil.copy(index, "other")
            os.replace("other", index)
        seen.append(feed)
        return found

    monkeypatch.setattr(sess, "run", run_and_replace)
    with pytest.raises(FileNotFoundError, match="model-3 was replaced while it was read"):
        gpt2.load_gpt2(sess)
    seen.clear()
    with locks.lock_run("checkpoint/run1"):  # as a process that trains holds it
        gpt2.load_gpt2(sess)
    assert len(seen) == 2


def test_load_into_a_session_that_trains_is_an_error(workplace, sess):
    finetune(sess, run_name="other")

    def on_step(entry):
        assert len(texts(sess, run_name="run1")) == 1  # its own weights may be used
        for use in (texts, gpt2.load_gpt2, finetune):
            with pytest.raises(RuntimeError, match="is training checkpoint/run1: load and train"):
                use(sess, run_name="other")

    assert finetune(sess, on_step=on_step).step == 3
    gpt2.load_gpt2(sess, run_name="other")


def test_fresh_start_mentions_an_earlier_best_checkpoint(workplace, sess, capsys):
    said = "Checkpoint 'best' in checkpoint/run1 is that of an earlier training\n"
    finetune(sess, val_split=0.2)
    finetune(sess)
    assert said not in capsys.readouterr().out
    finetune(sess, restore_from="fresh")
    assert said in capsys.readouterr().out


def test_second_finetune_in_another_thread_is_refused_before_it_loads(workplace, sess, monkeypatch):
    from gpt_2_simple.training import finetune as module

    errors, load_data = [], module._load_data

    def use_meanwhile(*args):  # the first call has loaded its weights, and has not built its step
        monkeypatch.setattr(module, "_load_data", load_data)

        def use():
            for use in (gpt2.load_gpt2, finetune):
                try:
                    use(sess, model_name="tiny", run_name="other")
                except RuntimeError as error:
                    errors.append(str(error))

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        return load_data(*args)

    def finetune(sess, **names):
        return gpt2.finetune(sess, "text.txt", **{**RUN, "steps": 1, **names})

    monkeypatch.setattr(module, "_load_data", use_meanwhile)
    assert finetune(sess).step == 1
    assert len(errors) == 2
    assert all("is training checkpoint/run1" in text for text in errors)
    assert not os.path.exists("checkpoint/other")


@pytest.mark.parametrize("release", ["0.8.1", "this"])
def test_named_base_model_keeps_the_loaded_run(workplace, sess, capsys, release):
    finetune(sess, run_name="mine", learning_rate=0.1, verbose=0)
    from_run = texts(sess, temperature=0)
    if release == "0.8.1":
        os.remove("checkpoint/mine/settings.json")
    with gpt2.start_tf_sess() as fresh:
        gpt2.load_gpt2(fresh, run_name="mine", verbose=0)
        capsys.readouterr()
        both = texts(fresh, temperature=0, model_name="tiny", run_name="mine")
        assert both == from_run
        assert texts(fresh, temperature=0, model_name="tiny") == from_run
        assert capsys.readouterr().out == ""


def test_another_model_than_the_base_of_the_loaded_run_is_loaded(workplace, sess):
    shutil.copytree("models/tiny", "models/other")
    finetune(sess, run_name="mine", learning_rate=0.1, verbose=0)
    with gpt2.start_tf_sess() as fresh:
        gpt2.load_gpt2(fresh, model_name="other", verbose=0)
        expected = texts(fresh, temperature=0)
    with gpt2.start_tf_sess() as fresh:
        gpt2.load_gpt2(fresh, run_name="mine", verbose=0)
        assert texts(fresh, temperature=0) != expected
        assert texts(fresh, temperature=0, model_name="other") == expected


def test_generate_waits_for_another_thread_that_loads(workplace, sess, monkeypatch):
    gpt2.load_gpt2(sess, model_name="tiny", verbose=0)
    expected, found, restore = texts(sess), [], load.restore_weights
    generating = threading.Thread(target=lambda: found.append(texts(sess)))

    def restore_slowly(*args):
        generating.start()
        generating.join(0.2)  # long enough for an error, had it not waited
        assert found == []
        restore(*args)

    monkeypatch.setattr(load, "restore_weights", restore_slowly)
    gpt2.load_gpt2(sess, model_name="tiny", verbose=0)
    generating.join()
    assert found == [expected]


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_checkpoint_of_another_type_is_converted(workplace, sess, dtype):
    prefix = "models/tiny/model.ckpt"
    reader = tf.train.load_checkpoint(prefix)
    expected = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    with tf.Graph().as_default(), tf.compat.v1.Session() as other:
        names, values = list(expected), [value.astype(dtype) for value in expected.values()]
        other.run(tf.raw_ops.SaveV2(
            prefix=prefix, tensor_names=names, shape_and_slices=[""] * len(names), tensors=values,
        ))  # fmt: skip
    gpt2.load_gpt2(sess, model_name="tiny", verbose=0)
    variables = session.named_variables(session.graph_state(sess))
    for name, value in sess.run(variables).items():
        assert np.array_equal(value, expected[name].astype(dtype).astype(np.float32))


def test_unwritable_destination_is_an_error_before_the_work(loaded, workplace):
    (workplace / "rows.csv").write_text("a\nb\n")
    for work in (
        lambda: gpt2.encode_dataset("text.txt", model_name="tiny", out_path="no/where.npz"),
        lambda: gpt2.encode_csv("rows.csv", out_path="no/where.txt"),
        lambda: gpt2.generate(loaded, length=3, destination_path="no/where.txt"),
    ):
        with pytest.raises(FileNotFoundError, match="_path='no/where.*there is no folder '/.*/no'"):
            work()
    gpt2.encode_dataset("text.txt", model_name="tiny", out_path=workplace / "a.TOKENS")
    assert os.path.isfile("a.TOKENS")


def test_failed_generate_keeps_the_old_destination_file(loaded, workplace):
    (workplace / "texts.txt").write_text("old")
    (workplace / "texts.txt.part").write_text("mine")
    with pytest.raises(ValueError, match="leave no token to choose"):
        gpt2.generate(loaded, length=400, no_repeat_ngram_size=1, destination_path="texts.txt")
    assert (workplace / "texts.txt").read_text() == "old"
    assert (workplace / "texts.txt.part").read_text() == "mine"
    assert sorted(os.listdir()) == ["models", "text.txt", "texts.txt", "texts.txt.part"]


@pytest.mark.parametrize("path", [5, None, {"text.txt"}, ["text.txt", 5]])
def test_dataset_that_is_not_a_path_is_an_error(workplace, sess, path):
    with pytest.raises(ValueError, match="the dataset .* is neither a path nor a list of paths"):
        finetune(sess, path)


def test_text_given_as_dataset_path_is_shortened_in_the_error(workplace, sess):
    with pytest.raises(FileNotFoundError, match="give the path of a file, not the text") as caught:
        finetune(sess, "To be, or not to be\n" * 1000)
    assert len(str(caught.value)) < 200


def test_undecodable_bytes_are_counted_in_a_warning(workplace, sess):
    (workplace / "some.txt").write_bytes("déjà vu, tout à fait".encode("latin-1"))
    expected = "3 bytes are not UTF-8 .* as in encoding='latin-1'"
    with pytest.warns(UserWarning, match=expected) as caught:
        finetune(sess, "some.txt")
    assert [warning.filename for warning in caught] == [__file__]


def test_dataset_shorter_than_a_window(workplace, sess, capsys):
    (workplace / "short.txt").write_text("just this")
    result = finetune(sess, "short.txt")
    assert "training on windows of 10" in capsys.readouterr().out
    assert np.isfinite(result.loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.pop("n_ctx"), r"hparams.json lacks n_ctx"),
        (lambda h: h.update(n_positions=3), r"hparams.json: unknown.*n_positions"),
        (lambda h: h.update(n_vocab=300), r"encoder.json.*257.*300|300.*257"),
        (lambda h: h.update(n_embd=18), r"wpe has shape \[32, 16\], \[32, 18\]|18"),
        (lambda h: h.update(n_layer=3), r"model/h2/\S+ is missing"),
        (lambda h: h.update(n_ctx=16), r"wpe has shape"),
    ],
)
def test_wrong_hparams_json_names_the_problem(workplace, sess, change, message):
    path = workplace / "models/tiny/hparams.json"
    hparams = json.loads(path.read_text())
    change(hparams)
    path.write_text(json.dumps(hparams))
    with pytest.raises(ValueError, match=message):
        gpt2.load_gpt2(sess, model_name="tiny")
    with pytest.raises(ValueError, match=message):
        finetune(sess)


def test_encode_dataset_with_mismatching_vocabulary_is_an_error(workplace):
    path = workplace / "models/tiny/hparams.json"
    path.write_text(path.read_text().replace("257", "300"))
    with pytest.raises(ValueError, match=r"encoder\.json has 257 tokens, but n_vocab=300"):
        gpt2.encode_dataset("text.txt", model_name="tiny")
    assert not os.path.exists("text_encoded.npz")


@pytest.mark.parametrize("content", ["", "[1]", '{"n_vocab": 2', "null"])
def test_hparams_json_that_is_no_object_is_an_error(workplace, sess, content):
    (workplace / "models/tiny/hparams.json").write_text(content)
    with pytest.raises(ValueError, match=r"hparams\.json"):
        gpt2.load_gpt2(sess, model_name="tiny")


def test_damaged_checkpoint_is_an_error(workplace, sess):
    path = workplace / "models/tiny/model.ckpt.data-00000-of-00001"
    data = bytearray(path.read_bytes())
    data[100] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.ckpt is damaged"):
        gpt2.load_gpt2(sess, model_name="tiny")
    path.write_bytes(data[:-50])
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        gpt2.load_gpt2(sess, model_name="tiny")


def test_unwritable_run_folder_is_an_error(workplace, sess, monkeypatch):
    os.mkdir("checkpoint")
    (workplace / "checkpoint" / "run1").write_text("mine")
    with pytest.raises(NotADirectoryError, match="run1 is a file; give another run_name"):
        finetune(sess)
    with pytest.raises(FileNotFoundError, match="no run in checkpoint/run1"):
        gpt2.load_gpt2(sess)
    assert (workplace / "checkpoint" / "run1").read_text() == "mine"

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(locks, "open", refuse, raising=False)
    with pytest.raises(PermissionError, match="cannot write in checkpoint/run2.*checkpoint_dir"):
        finetune(sess, run_name="run2")
    assert os.listdir("checkpoint/run2") == []


def test_run_without_hparams_json(workplace, sess):
    finetune(sess)
    os.remove("checkpoint/run1/hparams.json")
    for use in (lambda: gpt2.load_gpt2(sess), gpt2.plot_history):
        with pytest.raises(FileNotFoundError, match=r"run1: it has no hparams\.json"):
            use()
    assert finetune(sess).step == 6
    gpt2.load_gpt2(sess)


def test_model_of_other_sizes_needs_reset_session(workplace, loaded):
    gpt2.create_gpt2(model_name="other", n_layer=1, n_head=2, n_embd=8, n_ctx=16)
    with pytest.raises(ValueError, match="reset_session"):
        gpt2.load_gpt2(loaded, model_name="other")
    fresh = gpt2.reset_session(loaded)
    gpt2.load_gpt2(fresh, model_name="other")
    assert texts(fresh)
    fresh.close()


def test_run_of_another_model_is_not_continued(workplace, sess):
    finetune(sess)
    gpt2.create_gpt2(model_name="other", n_layer=1, n_head=2, n_embd=8, n_ctx=16)
    with gpt2.start_tf_sess() as another, pytest.raises(ValueError, match="other sizes"):
        finetune(another, model_name="other")


def test_generate_with_nan_weights_is_an_error(workplace, loaded):
    (gain,) = (v for v in loaded.graph.get_collection("variables") if v.op.name == "model/ln_f/g")
    value = np.full(gain.shape, np.nan, np.float32)
    loaded.run(gain.initializer, {gain.initializer.inputs[1]: value})
    for use in USES:
        with pytest.raises(RuntimeError, match="weights are broken.*load another checkpoint"):
            use(loaded)


# --- creating models ------------------------------------------------------------------------------


def test_create_gpt2_writes_seven_files(workplace):
    assert gpt2.is_gpt2_downloaded(model_name="tiny")
    os.remove("models/tiny/vocab.bpe")
    assert not gpt2.is_gpt2_downloaded(model_name="tiny")


def test_create_gpt2_needs_overwrite_to_replace(workplace):
    with pytest.raises(FileExistsError, match="overwrite=True"):
        gpt2.create_gpt2(model_name="tiny")
    gpt2.create_gpt2(model_name="tiny", n_layer=1, n_head=1, n_embd=4, n_ctx=8, overwrite=True)
    assert folders.read_hparams("models/tiny").n_layer == 1
    assert os.listdir("models") == ["tiny"]


def test_two_threads_that_create_one_model_do_not_mix(workplace):
    def create(seed):
        try:
            done.append(gpt2.create_gpt2(model_name="both", n_layer=1, n_embd=8, seed=seed))
        except FileExistsError as error:
            refused.append(str(error))

    done, refused = [], []
    threads = [threading.Thread(target=create, args=[seed]) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(done), len(refused)) == (1, 2)
    assert sorted(path.name for path in Path("models/both").iterdir()) == sorted(MODEL_FILES)
    assert [path.name for path in Path("models").iterdir() if path.name.startswith(".")] == []


def test_create_gpt2_replaces_only_files_of_a_model(workplace):
    (workplace / "models" / "tiny" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="tiny holds notes.txt, which is no file of a model"):
        gpt2.create_gpt2(model_name="tiny", overwrite=True)
    assert (workplace / "models" / "tiny" / "notes.txt").read_text() == "mine"
    assert gpt2.is_gpt2_downloaded(model_name="tiny")


def test_create_gpt2_refuses_a_size_given_as_the_dataset(workplace):
    with pytest.raises(ValueError, match="name of a size: give model_name='mini'"):
        gpt2.create_gpt2("mini")
    with pytest.raises(FileNotFoundError):
        gpt2.create_gpt2("txet.txt")
    assert os.listdir("models") == ["tiny"]


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_create_gpt2_never_replaces_the_folder_of_models(workplace, name):
    before = sorted(os.listdir(workplace)), sorted(os.listdir("models"))
    with pytest.raises(OSError):  # noqa: PT011
        gpt2.create_gpt2(model_name=name, n_layer=1, n_head=1, n_embd=4, n_ctx=8, overwrite=True)
    assert (sorted(os.listdir(workplace)), sorted(os.listdir("models"))) == before
    assert gpt2.is_gpt2_downloaded(model_name="tiny")


def test_create_gpt2_replaces_the_model_that_a_link_leads_to(workplace):
    os.rename("models/tiny", "elsewhere")
    os.symlink("../elsewhere", "models/tiny")
    for n_layer in (1, 2):
        sizes = {"n_layer": n_layer, "n_head": 1, "n_embd": 4, "n_ctx": 8}
        gpt2.create_gpt2(model_name="tiny", overwrite=True, **sizes)
        assert folders.read_hparams("elsewhere").n_layer == n_layer
    assert os.path.islink("models/tiny")
    assert os.listdir("models") == ["tiny"]


def test_create_gpt2_seed_repeats_the_weights(workplace):
    values = []
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        gpt2.create_gpt2(model_name=name, n_layer=1, n_head=1, n_embd=4, n_ctx=8, seed=seed)
        values.append(tf.train.load_checkpoint(f"models/{name}").get_tensor("model/wte"))
    assert np.array_equal(values[0], values[1])
    assert not np.array_equal(values[0], values[2])


def test_create_gpt2_trains_a_vocabulary(workplace, sess):
    pytest.importorskip("tokenizers")
    gpt2.create_gpt2("text.txt", "words", n_layer=1, n_head=2, n_embd=16, n_ctx=32, vocab_size=300)
    hparams = folders.read_hparams("models/words")
    assert 257 < hparams.n_vocab <= 300
    finetune(sess, model_name="words")
    assert texts(sess)
    with pytest.raises(ValueError, match="needs a dataset"):
        gpt2.create_gpt2(model_name="x", vocab_size=300)
    with pytest.raises(ValueError, match="n_ctx=1 must be a whole number, 2 or above"):
        gpt2.create_gpt2(model_name="x", n_ctx=1)
    with pytest.raises(ValueError, match="vocab_size=100 must be a whole number, 257 or above"):
        gpt2.create_gpt2("text.txt", "x", vocab_size=100)


def test_failed_create_gpt2_leaves_nothing(workplace, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(create, "write_model", fail)
    with pytest.raises(OSError, match="space"):
        gpt2.create_gpt2(model_name="tiny", overwrite=True)
    assert gpt2.is_gpt2_downloaded(model_name="tiny")
    assert os.listdir("models") == ["tiny"]
    shutil.rmtree("models")


DETERMINISTIC = """
import tensorflow as tf
tf.config.experimental.enable_op_determinism()
tf.random.set_seed(1)
import gpt_2_simple as gpt2
gpt2.create_gpt2(model_name="new", n_layer=1, n_head=1, n_embd=8, n_ctx=16, seed=1)
with gpt2.start_tf_sess() as sess:
    gpt2.load_gpt2(sess, model_name="new")
    gpt2.finetune(sess, "text.txt", model_name="new", steps=2, sample_every=0, seed=1)
"""


def test_load_create_and_finetune_with_op_determinism(workplace):
    done = subprocess.run(
        [sys.executable, "-c", DETERMINISTIC], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert os.path.isfile("checkpoint/run1/model-2.index")
