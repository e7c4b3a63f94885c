"""Models to and from folders of Hugging Face transformers; what is refused, and what is left."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import tensorflow as tf
from exchange_models import (
    HPARAMS,
    as_transformers,
    assert_weights_equal,
    change_tensors,
    read_ours,
    write_ours,
    write_transformers,
)
from small_model import GREEDY, log_softmax

import gpt_2_simple as gpt2
from gpt_2_simple.common.folders import read_hparams
from gpt_2_simple.data.vocabulary import byte_vocabulary
from gpt_2_simple.encoder import get_encoder
from gpt_2_simple.exchange import huggingface
from gpt_2_simple.generation.sequences import generate_tokens
from gpt_2_simple.storage import checkpoint, runs, safetensors_file

tf1 = tf.compat.v1
safetensors_numpy = pytest.importorskip("safetensors.numpy")
FILES = [
    "README.md", "config.json", "generation_config.json", "merges.txt", "model.safetensors",
    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
]  # fmt: skip


@pytest.fixture(autouse=True)
def current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def weights():
    """The weights of models/mine."""
    return write_ours("models/mine")


def exported(path):
    return safetensors_numpy.load_file(Path(path, "model.safetensors"))


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


# --- export -------------------------------------------------------------------------------------


def test_export_writes_all_files_and_returns_the_folder(weights, capsys):
    path = gpt2.export_huggingface(model_name="mine")
    assert path == os.path.join("export", "mine")
    assert sorted(os.listdir(path)) == FILES
    assert capsys.readouterr().out == f"Exported to {path}\n"


def test_exported_tensors_have_transformers_names_shapes_and_values(weights):
    found = exported(gpt2.export_huggingface(model_name="mine"))
    assert_weights_equal(found, as_transformers(weights))
    assert found["transformer.h.2.mlp.c_fc.weight"].shape == (32, 128)
    assert not [name for name in found if name.startswith("lm_head")]  # tied: stored once


def test_exported_config_states_the_sizes_and_the_tokens(weights):
    path = Path(gpt2.export_huggingface(model_name="mine", precision="bfloat16"))
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "gpt2"
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert [config[n] for n in ("vocab_size", "n_positions", "n_embd", "n_head", "n_layer")] == [
        257, 32, 32, 2, 3,
    ]  # fmt: skip
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, 256)
    assert config["torch_dtype"] == "bfloat16"
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == 32
    assert tokenizer["eos_token"] == "<|endoftext|>"
    assert tokenizer["clean_up_tokenization_spaces"] is False


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_export_in_16_bits_rounds_to_the_nearest(weights, precision):
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if precision == "bfloat16" else np.float16
    found = exported(gpt2.export_huggingface(model_name="mine", precision=precision))
    expected = {name: value.astype(dtype) for name, value in as_transformers(weights).items()}
    assert_weights_equal(found, expected)


def test_a_large_model_is_exported_in_shards(weights):
    path = Path(gpt2.export_huggingface(model_name="mine", max_shard_size="50KB"))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert not (path / "model.safetensors").exists()
    found = {}
    for shard in shards:
        tensors = safetensors_numpy.load_file(path / shard)
        assert {index["weight_map"][name] for name in tensors} == {shard}
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= 50_000
        found |= tensors
    assert_weights_equal(found, as_transformers(weights))
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())


@pytest.mark.parametrize(
    ("size", "number"),
    [(1000, 1000), ("1000", 1000), ("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2MiB", 2 << 20)],
)
def test_sizes_are_numbers_or_have_a_unit(size, number):
    assert huggingface.parse_size("max_shard_size", size) == number


@pytest.mark.parametrize("size", [0, -1, "", "GB", "5TB", "5 5", "-1GB", "0", "1e3", "9" * 400])
def test_sizes_that_are_none_are_told(size):
    with pytest.raises(ValueError, match="max_shard_size=.*must be a number of bytes"):
        gpt2.export_huggingface(model_name="mine", max_shard_size=size)


def make_run(step=7, name="run1"):
    """checkpoint/<name> with the model's weights, as a run has them."""
    run = Path("checkpoint", name)
    shutil.copytree("models/mine", run)
    for file in list(run.glob("model.ckpt.*")):
        file.rename(file.with_name(file.name.replace("model.ckpt", f"model-{step}")))
    (run / "checkpoint").write_text(checkpoint.list_text([f"model-{step}"]))
    (run / "counter").write_text(f"{step}\n")
    return run


def test_a_run_is_exported_by_its_name(weights):
    make_run(name="poems")
    path = gpt2.export_huggingface("poems", path="out/poems/")
    assert path == os.path.join("out", "poems")
    assert_weights_equal(exported(path), as_transformers(weights))


@pytest.mark.parametrize("name", ["latest", "model-7", 7, np.int64(7)])
def test_a_runs_checkpoint_is_named_as_in_load_gpt2(weights, name):
    make_run()
    assert_weights_equal(
        exported(gpt2.export_huggingface(checkpoint=name)), as_transformers(weights)
    )


def test_the_best_checkpoint_is_exported(weights):
    run = make_run()
    best = {name: value + 1 for name, value in weights.items()}
    write_ours("models/better", weights=best)
    for file in Path("models/better").glob("model.ckpt.*"):
        shutil.copy(file, run / file.name.replace("model.ckpt", "best"))
    found = exported(gpt2.export_huggingface(checkpoint="best"))
    assert_weights_equal(found, as_transformers(best))


def test_the_model_card_tells_the_run(weights):
    run = make_run()
    settings = {"dataset": ["/home/me/private/poems.txt", "b.csv"], "model_name": "124M"}
    settings |= {"learning_rate": 0.0003, "optimizer": "adam", "model_dir": "/home/me/models"}
    (run / "settings.json").write_text(json.dumps(settings))
    lines = [{"step": n, "loss": 3.0, "seconds": 1.0, "learning_rate": 0.1} for n in (6, 7, 8)]
    lines[1]["validation_loss"] = 2.5
    lines[2] |= {"loss": 99.0, "validation_loss": 88.0}  # after the checkpoint
    (run / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = Path(gpt2.export_huggingface(), "README.md").read_text()
    assert "trained on `poems.txt`, `b.csv`" in card
    for row in ["steps | 7", "training loss, averaged | 3.0000", "validation loss | 2.5000"]:
        assert f"| {row} |" in card
    assert "| learning_rate | 0.0003 |" in card
    assert "`model-7`" in card
    assert "/home" not in card
    assert "base_model" not in card  # the sizes are not those of OpenAI's 124M


def test_the_model_card_of_a_run_of_0_8_1_tells_what_is_known(weights):
    make_run()
    card = Path(gpt2.export_huggingface(), "README.md").read_text()
    assert "3 blocks, 2 heads, a width of 32" in card
    assert "| steps | 7 |" in card


# --- import -------------------------------------------------------------------------------------


def test_import_makes_a_model_that_generates(current_folder, sess):
    weights = write_transformers("theirs")
    folder = gpt2.import_huggingface("theirs")
    assert folder == os.path.join("models", "theirs")
    assert_weights_equal(read_ours(folder), weights)
    assert gpt2.is_gpt2_downloaded(model_name="theirs")
    gpt2.load_gpt2(sess, model_name="theirs")
    (text,) = gpt2.generate(
        sess, prefix="ab", length=8, top_k=1, return_as_list=True, truncate=None
    )
    tokens = byte_vocabulary().encode("ab")
    for _ in range(8):
        tokens.append(int(oracle.logits(weights, HPARAMS, tokens)[-1].argmax()))
    assert text == byte_vocabulary().decode(tokens)


def test_an_imported_model_is_restored_as_openais_code_does():
    weights = write_transformers("theirs")
    folder = gpt2.import_huggingface("theirs")
    prefix = tf1.train.latest_checkpoint(folder)
    with tf1.Session(graph=tf1.Graph()) as restored:
        tf1.train.import_meta_graph(f"{prefix}.meta").restore(restored, prefix)
        found = {v.op.name: restored.run(v) for v in tf1.global_variables()}
    assert_weights_equal(found, weights)


def test_an_exported_model_comes_back_as_it_was(weights):
    path = gpt2.export_huggingface(model_name="mine", max_shard_size="20KB")
    gpt2.import_huggingface(path, model_name="again")
    assert_weights_equal(read_ours("models/again"), weights)
    for name in ("encoder.json", "vocab.bpe", "hparams.json", "checkpoint"):
        assert Path("models/again", name).read_bytes() == Path("models/mine", name).read_bytes()


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_16_bits_come_back_as_float32(weights, precision):
    path = gpt2.export_huggingface(model_name="mine", precision=precision)
    folder = gpt2.import_huggingface(path, model_name="again")
    narrowed = exported(path)
    expected = {name: narrowed[name].astype(np.float32) for name in narrowed}
    assert_weights_equal(as_transformers(read_ours(folder)), expected)


def test_tensors_without_the_prefix_transformer_are_imported():
    weights = write_transformers("theirs", prefix="")
    assert_weights_equal(read_ours(gpt2.import_huggingface("theirs")), weights)


def test_buffers_and_a_tied_head_are_left_out(capsys):
    weights = write_transformers("theirs")

    def add(tensors):
        tensors["transformer.h.0.attn.bias"] = np.tril(np.ones((1, 1, 32, 32), bool))
        tensors["transformer.h.0.attn.masked_bias"] = np.array(-1e4, np.float32)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]

    change_tensors("theirs", add)
    assert_weights_equal(read_ours(gpt2.import_huggingface("theirs")), weights)
    assert "note" not in capsys.readouterr().out


def test_a_head_for_other_tasks_is_left_out_with_a_note(capsys):
    weights = write_transformers("theirs")
    change_tensors("theirs", lambda t: t.update({"score.weight": np.zeros((2, 32), np.float32)}))
    assert_weights_equal(read_ours(gpt2.import_huggingface("theirs")), weights)
    assert "note: left out score.weight" in capsys.readouterr().out


def test_sizes_have_transformers_other_names_too():
    write_transformers("theirs")
    config = json.loads(Path("theirs/config.json").read_text())
    names = {"n_embd": "hidden_size", "n_head": "num_attention_heads"}
    names |= {"n_layer": "num_hidden_layers", "n_positions": "max_position_embeddings"}
    config |= {new: config.pop(old) for old, new in names.items()}
    Path("theirs/config.json").write_text(json.dumps(config))
    gpt2.import_huggingface("theirs")
    assert json.loads(Path("models/theirs/hparams.json").read_text())["n_layer"] == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt_neo"}, "model_type='gpt_neo' is not 'gpt2'"),
        ({"activation_function": "gelu"}, "activation_function='gelu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"n_inner": 100}, "n_inner=100 .*4 [*] n_embd = 128"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
        ({"pruned_heads": {"1": [0]}}, "pruned_heads="),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"n_head": 5}, "must be a multiple of n_head"),
        ({"n_layer": "3"}, "n_layer='3'"),
        ({"vocab_size": -1}, "n_vocab=-1"),
    ],
)
def test_what_is_not_gpt_2_is_refused_by_its_field(fields, message):
    write_transformers("theirs", **fields)
    with pytest.raises(ValueError, match=message):
        gpt2.import_huggingface("theirs")
    assert files_below(".") == [
        os.path.join("theirs", name)
        for name in ("config.json", "merges.txt", "model.safetensors", "vocab.json")
    ]


@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh"])
def test_other_names_of_the_tanh_gelu_are_taken(name):
    write_transformers("theirs", activation_function=name)
    assert gpt2.import_huggingface("theirs")


def drop(name):
    return lambda: change_tensors("theirs", lambda tensors: tensors.pop(name))


def set_tensor(name, value):
    return lambda: change_tensors("theirs", lambda tensors: tensors.update({name: value}))


def cut(name, share):
    def cut_file():
        content = Path("theirs", name).read_bytes()
        Path("theirs", name).write_bytes(content[: int(len(content) * share)])

    return cut_file


def remove(name):
    return lambda: Path("theirs", name).unlink()


def rename(old, new):
    return lambda: Path("theirs", old).rename(Path("theirs", new))


NAN = np.full((32, 32), np.nan, np.float32)
BROKEN = {
    "truncated": (cut("model.safetensors", 0.7), ValueError, "not a whole safetensors file"),
    "empty": (cut("model.safetensors", 0), ValueError, "not a whole safetensors file"),
    "no_weights": (remove("model.safetensors"), FileNotFoundError, "theirs has no weights"),
    "no_config": (remove("config.json"), FileNotFoundError, "theirs has no config.json"),
    "broken_config": (cut("config.json", 0.5), ValueError, "config.json is not JSON"),
    "no_tokenizer": (remove("vocab.json"), FileNotFoundError, "neither tokenizer.json nor"),
    "pickle": (
        rename("model.safetensors", "pytorch_model.bin"),
        FileNotFoundError,
        r"theirs has pytorch_model.bin: its weights are pickles.*save_pretrained\('converted'\)",
    ),
    "lone_shard": (
        rename("model.safetensors", "model-00001-of-00002.safetensors"),
        FileNotFoundError,
        "model.safetensors.index.json with its shards, is missing; model-00001",
    ),
    "missing": (
        drop("transformer.h.1.ln_2.bias"),
        ValueError,
        "lacks the tensor transformer.h.1.ln_2.bias",
    ),
    "shape": (
        set_tensor("transformer.wpe.weight", np.zeros((31, 32), np.float32)),
        ValueError,
        r"transformer.wpe.weight has shape \[31, 32\], and by config.json it has \[32, 32\]",
    ),
    "nan": (
        set_tensor("transformer.h.2.attn.c_proj.weight", NAN),
        ValueError,
        "h.2.attn.c_proj.weight holds numbers that are infinite or not a number",
    ),
    "untied": (
        set_tensor("lm_head.weight", np.ones((257, 32), np.float32)),
        ValueError,
        "lm_head.weight differs from transformer.wte.weight",
    ),
    "untied_shape": (
        set_tensor("lm_head.weight", np.ones((3, 32), np.float32)),
        ValueError,
        "lm_head.weight differs from transformer.wte.weight",
    ),
    "foreign": (
        set_tensor("transformer.h.0.crossattention.c_attn.weight", NAN),
        ValueError,
        "has the tensor h.0.crossattention.c_attn.weight, which GPT-2 has not",
    ),
    "more_blocks": (
        set_tensor("transformer.h.3.ln_1.bias", np.zeros(32, np.float32)),
        ValueError,
        "has the tensor h.3.ln_1.bias, which GPT-2 has not",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_told_and_nothing_is_left(case):
    write_transformers("theirs")
    breaks, kind, message = BROKEN[case]
    breaks()
    before = files_below(".")
    with pytest.raises(kind, match=message):
        gpt2.import_huggingface("theirs")
    assert files_below(".") == before
    assert not os.path.exists("models") or os.listdir("models") == []


def test_a_missing_shard_is_told(weights):
    path = gpt2.export_huggingface(model_name="mine", max_shard_size="50KB")
    shard = sorted(name for name in os.listdir(path) if name.startswith("model-"))[1]
    os.remove(os.path.join(path, shard))
    with pytest.raises(FileNotFoundError, match=f"lacks {shard}, which model.safetensors.index"):
        gpt2.import_huggingface(path, model_name="again")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is no index of shards"),
        ('{"weight_map": {}}', "is no index of shards"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "which is not a file beside it"),
        ('{"weight_map": {"a": 3}}', "is no index of shards"),
        ("[" * 100_000, "is no index of shards"),
    ],
)
def test_a_broken_index_of_shards_is_told(content, message):
    write_transformers("theirs")
    Path("theirs/model.safetensors").unlink()
    Path("theirs/model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        gpt2.import_huggingface("theirs")


def test_an_adapter_alone_is_told():
    write_transformers("theirs")
    Path("theirs/config.json").rename("theirs/adapter_config.json")
    with pytest.raises(FileNotFoundError, match="it holds an adapter of peft"):
        gpt2.import_huggingface("theirs")


def test_a_file_in_place_of_a_folder_is_told():
    write_transformers("theirs")
    with pytest.raises(NotADirectoryError, match="give the folder that holds the model"):
        gpt2.import_huggingface("theirs/model.safetensors")


def test_a_revision_of_a_folder_is_told():
    write_transformers("theirs")
    with pytest.raises(ValueError, match="revision='main' is for models on the hub"):
        gpt2.import_huggingface("theirs", revision="main")


# --- nothing is replaced, and nothing half is left ------------------------------------------------


@pytest.mark.parametrize("make", [os.mkdir, lambda path: Path(path).write_text("mine")])
def test_what_exists_is_not_replaced(weights, make):
    write_transformers("theirs")
    make("there")
    before = files_below(".")
    with pytest.raises(FileExistsError, match="there exists, and nothing is replaced"):
        gpt2.export_huggingface(model_name="mine", path="there")
    with pytest.raises(FileExistsError, match="mine exists, and nothing is replaced"):
        gpt2.import_huggingface("theirs", model_name="mine")
    assert files_below(".") == before


def test_what_is_made_meanwhile_is_not_replaced(weights, monkeypatch):
    write = safetensors_file.write_tensors

    def write_slowly(*args):
        write(*args)
        os.mkdir("there")
        Path("there/a").write_text("somebody else's")

    monkeypatch.setattr(safetensors_file, "write_tensors", write_slowly)
    with pytest.raises(FileExistsError, match="there was made meanwhile"):
        gpt2.export_huggingface(model_name="mine", path="there")
    assert files_below("there") == ["a"]
    assert [name for name in os.listdir(".") if name.startswith(".")] == []


def test_what_a_killed_export_left_is_removed_by_the_next(weights):
    os.makedirs("export/.mine.new")
    Path("export/.mine.new/model.safetensors").write_text("half")
    path = gpt2.export_huggingface(model_name="mine")
    assert os.listdir("export") == ["mine"]
    assert_weights_equal(exported(path), as_transformers(weights))


def test_folders_with_brackets_in_their_names(weights):
    os.rename("models", "models[1]")
    path = gpt2.export_huggingface(model_name="mine", model_dir="models[1]", path="out[a-z]")
    folder = gpt2.import_huggingface(path, "again", model_dir="models[1]")
    assert_weights_equal(read_ours(shutil.copytree(folder, "plain")), weights)


def replace_checkpoint_once(monkeypatch):
    """Replaces model-7 by model-8 when an export has just chosen it, as a training may do."""
    opened = []

    def replace_and_open(prefix):
        opened.append(prefix)
        if len(opened) == 1:
            for file in list(Path("checkpoint/run1").glob("model-7.*")):
                file.rename(file.with_name(file.name.replace("model-7", "model-8")))
        return open_checkpoint(prefix)

    open_checkpoint = huggingface.open_checkpoint
    monkeypatch.setattr(huggingface, "open_checkpoint", replace_and_open)
    return opened


def test_a_checkpoint_that_a_training_replaces_is_exported_as_the_next(weights, monkeypatch):
    make_run()
    opened = replace_checkpoint_once(monkeypatch)
    monkeypatch.setattr(runs, "is_being_trained", lambda folder: True)
    path = gpt2.export_huggingface()
    assert [os.path.basename(prefix) for prefix in opened] == ["model-7", "model-8"]
    assert_weights_equal(exported(path), as_transformers(weights))
    assert "`model-8`" in Path(path, "README.md").read_text()


def test_a_checkpoint_that_goes_away_without_a_training_is_told(weights, monkeypatch):
    make_run()
    replace_checkpoint_once(monkeypatch)
    with pytest.raises(FileNotFoundError, match="model-7"):
        gpt2.export_huggingface()
    assert files_below("export") == []


def test_an_unknown_run_or_model_is_told(weights):
    make_run(name="poems")
    with pytest.raises(FileNotFoundError, match="no run in .*poem.*runs there: poems"):
        gpt2.export_huggingface("poem")
    with pytest.raises(FileNotFoundError, match="no model in .*models there: mine"):
        gpt2.export_huggingface(model_name="min")
    with pytest.raises(FileNotFoundError, match="no whole checkpoint .*model-3; .*model-7"):
        gpt2.export_huggingface("poems", checkpoint=3)


def test_a_weight_that_is_not_finite_is_not_exported(weights):
    weights["model/h1/mlp/c_proj/b"][3] = np.inf
    write_ours("models/broken", weights=weights)
    with pytest.raises(ValueError, match="h.1.mlp.c_proj.bias holds numbers that are infinite"):
        gpt2.export_huggingface(model_name="broken")
    assert files_below("export") == []


def test_a_checkpoint_of_other_sizes_than_hparams_json_is_told(weights):
    path = Path("models/mine/hparams.json")
    path.write_text(path.read_text().replace('"n_layer": 3', '"n_layer": 4'))
    with pytest.raises(ValueError, match="does not fit its hparams.json.*h3/ln_1/g is missing"):
        gpt2.export_huggingface(model_name="mine")


LIMITED = """
import resource, sys
import gpt_2_simple as gpt2
gpt2.tf
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    {call}
except OSError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize(
    "call",
    [
        "gpt2.export_huggingface(model_name='mine', path='out')",
        "gpt2.import_huggingface('theirs', model_name='again')",
    ],
)
def test_a_full_disk_is_told_and_nothing_is_left(weights, call):
    write_transformers("theirs")
    before = files_below(".")
    code = LIMITED.replace("{call}", call)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240
    )
    assert "OSError could not write" in result.stdout, result.stderr
    assert "free some space on the disk" in result.stdout.lower()
    assert files_below(".") == before


# --- what transformers itself saved ---------------------------------------------------------------

# tests/make_transformers_fixture.py makes it.
FIXTURE = Path(__file__).parent / "fixtures" / "transformers"


def test_a_model_that_transformers_saved_computes_the_same(sess):
    expected = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))
    request, answer = expected["request"], expected["answer"]
    folder = gpt2.import_huggingface(FIXTURE)
    vocabulary = get_encoder(folder)
    for text, ids in zip(request["texts"], answer["ids"], strict=True):
        assert vocabulary.encode(text, allow_special=True) == ids, text
    hparams = read_hparams(folder)
    weights = read_ours(folder)
    ours = log_softmax(oracle.logits(weights, hparams, request["tokens"][0]))
    theirs = np.array(answer["log_probs"][0])
    assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()
    gpt2.load_gpt2(sess, model_name="transformers")
    chunks = list(generate_tokens(sess, [request["prefix"]], request["length"], GREEDY))
    assert np.concatenate(chunks, 1)[0].tolist() == answer["greedy"]
