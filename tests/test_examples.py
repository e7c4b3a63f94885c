"""Each example runs, with fewer steps. The notebook for Colab uses only names that exist."""

import ast
import asyncio
import csv
import inspect
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import served_model
from exchange_models import write_transformers

import gpt_2_simple as gpt2
from gpt_2_simple.serving import api
from gpt_2_simple.serving.engine import Engine
from gpt_2_simple.training import trainer

REPOSITORY = Path(__file__).parent.parent
EXAMPLES = REPOSITORY / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def replace_constants(source, **constants):
    """A source with other values of constants that it sets once, at the start of a line."""
    for name, value in constants.items():
        source, count = re.subn(rf"(?m)^{name} = [^\s#]+", f"{name} = {value!r}", source)
        assert count == 1, name
    return source


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script in an empty folder, with other constants; returns what it printed."""

    def run_script(name, **constants):
        source = (EXAMPLES / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(replace_constants(source, **constants), encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        runpy.run_path(name, run_name="__main__")
        return capsys.readouterr().out

    return run_script


def number_after(text, out):
    return float(out.partition(text)[2].split()[0])


def test_demo_trains_and_generates(run):
    out = run("demo.py", STEPS=3)
    assert "Saving checkpoint/demo/model-3" in out
    entropy = number_after("Unigram entropy of the text: ", out)
    assert 3 < entropy < 3.5
    assert number_after("Loss on text it never saw:", out) > entropy  # 3 steps teach nothing yet
    assert "\nThe " in out


def test_finetune_csv_generates_rows_that_end(run):
    out = run("finetune_csv.py", EPOCHS=0.15)
    best, last = map(int, re.search(r"Best after step (\d+) of (\d+):", out).groups())
    assert 1 <= best <= last
    written = out.partition("Loading checkpoint checkpoint/symbols/best\n")[2]
    assert "<|endoftext|>" not in written
    rows = re.split(r"(?m)^(?:known:|new:  ) ", written)[1:]
    assert len(rows) == 10
    assert sum(len(row) < 90 for row in rows) > 5


def test_resume_and_best_resumes_and_keeps_the_best_checkpoint(run):
    out = run("resume_and_best.py", STEPS=4)
    assert "Loading checkpoint checkpoint/reader/model-4\nLoading dataset" in out
    for checkpoint in ("model-4", "model-8", "best"):
        assert Path(f"checkpoint/reader/{checkpoint}.index").is_file()
    found = dict(re.findall(r"(?m)^(\S+) +perplexity ([\d.]+)$", out))
    assert list(found) == ["model-4", "latest", "best"]
    history = Path("checkpoint/reader/history.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in history]
    validated = [entry["step"] for entry in entries if "validation_loss" in entry]
    assert validated == [4, 8]  # the resumed run goes on counting


def test_stream_and_score_streams_and_ranks_texts(run):
    out = run("stream_and_score.py", STEPS=10)
    streamed = out.partition("Streamed:\n")[2].partition("\n\nThe likeliest tokens after")[0]
    assert streamed.startswith("Beautiful is")
    assert len(streamed) > len("Beautiful is")
    shares = [float(share) for share in re.findall(r"(?m)^ *([\d.]+)% ['\"]", out)]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)
    assert len(re.findall(r"(?m)^ +[\d.]+ (?:Simple|Complex) is better", out)) == 2
    texts = out.partition("gives the same texts:\n")[2].split("=" * 20 + "\n")
    assert [text[:3] for text in texts] == ["Now", "Now", "Alt", "Alt", ""]


def test_exchange_trains_an_imported_model_and_writes_it(run, tmp_path):
    write_transformers(tmp_path / "theirs")
    out = run("exchange.py", STEPS=2, SOURCE="theirs")
    adapter = out.partition("peft: PeftModel.from_pretrained(model, '")[2].partition("')")[0]
    assert Path(adapter, "adapter_model.safetensors").is_file()
    assert Path("export/zen-merged/model.safetensors").is_file()
    assert Path("export/zen-merged-f16/Modelfile").is_file()
    assert f"llama-cli -m {Path('export/zen-merged-f16/zen-merged-f16.gguf')}" in out


@pytest.fixture
def jokes(tmp_path):
    """The jokes of the table, which stands beside the script."""
    shutil.copy(EXAMPLES / "jokes.csv", tmp_path)
    with open(EXAMPLES / "jokes.csv", newline="", encoding="utf-8") as file:
        return [row["joke"] for row in csv.DictReader(file)]


def test_the_table_of_jokes_has_enough_of_them_and_none_twice(jokes):
    assert len(jokes) >= 150
    assert len(set(jokes)) == len(jokes)


def test_jokes_tells_ten_from_the_best_checkpoint(run, jokes):
    out = run("jokes.py", EPOCHS=0.5)
    best, last = map(int, re.search(r"Best after step (\d+) of (\d+):", out).groups())
    assert 1 <= best <= last
    assert "Loading checkpoint checkpoint/jokes/best\n" in out
    told = out.partition("The first ten others:\n")[2]
    assert len(re.findall("(?m)^- ", told)) == 10
    assert "<|endoftext|>" not in told


def test_jokes_leaves_out_copies_of_the_table_and_near_copies(run, jokes, monkeypatch):
    near = jokes[1].replace("and", "but")[:-1] + " today!"
    made = [f"\n{jokes[0]}\n", near, *(f"Number {i} is the new joke here." for i in range(10))]
    monkeypatch.setattr(gpt2, "generate", lambda *args, **kwargs: made, raising=False)
    out = run("jokes.py", EPOCHS=0.05)
    assert "2 of 12 texts copy a joke." in out
    told = out.partition("The first ten others:\n")[2].splitlines()
    assert told == [f"- {text}" for text in made[2:]]


@pytest.mark.parametrize("name", ["demo.py", "finetune_csv.py", "resume_and_best.py", "jokes.py"])
def test_ctrl_c_in_an_example_ends_it_without_a_traceback(run, jokes, monkeypatch, name):
    def draw_and_send(self):
        os.kill(os.getpid(), signal.SIGINT)
        return next_batches(self)

    next_batches = trainer.Trainer.next_batches
    monkeypatch.setattr(trainer.Trainer, "next_batches", draw_and_send)
    with pytest.raises(SystemExit, match="Interrupted: the run is saved"):
        run(name)
    assert list(Path("checkpoint").glob("*/model-*.index"))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of a server for a small model."""
    folder = tmp_path_factory.mktemp("models")
    served_model.write_model(folder)
    sess, _ = served_model.load(folder)
    engine = Engine(sess, max_batch=8, max_queue=16)
    engine.start()
    with served_model.serving(api.make_app({served_model.NAME: engine}, api.Limits())) as (
        address,
        _,
    ):
        yield address
    engine.close()
    sess.close()


def completed(address, prompt, **settings):
    """The lines that may follow a prompt."""
    options = {"stop": "\n", "seed": 3, "max_tokens": 9, **settings}
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        made = client.completions.create(
            model=served_model.NAME, prompt=prompt, extra_body={"truncate_prompt_tokens": -1},
            **options,
        )  # fmt: skip
    return [choice.text.strip() for choice in made.choices]


@pytest.fixture
def chat_bot():
    """Makes the bot of the example; its texts are short and depend on a seed."""
    example = runpy.run_path(str(EXAMPLES / "chat_bot.py"))
    example["SETTINGS"] |= {"seed": 3, "max_tokens": 9, "temperature": 1, "n": 1}

    def make(address, **settings):
        example["SETTINGS"] |= settings
        return example["ChatBot"](served_model.NAME, address)

    return make


def test_chat_bot_answers_with_the_line_that_follows_the_chat(chat_bot, served):
    async def chat():
        bot = chat_bot(served)
        async with bot.client:
            return [
                await bot.answer("Hi\nthere ", "Ann"), await bot.answer("Why?", "Ann"),
                await bot.answer("Why?", "Ann", chat="another"),
                await bot.answer("long " * 500, "Ann"),
            ]  # fmt: skip

    first, second, other, last = asyncio.run(chat())
    assert [first] == completed(served, "Ann: Hi there\nBot:")
    assert [second] == completed(served, f"Ann: Hi there\nBot: {first}\nAnn: Why?\nBot:")
    assert [other] == completed(served, "Ann: Why?\nBot:")
    assert [last] == completed(served, ("Ann: " + "long " * 500)[:500] + "\nBot:")
    assert len({first, second, other, last}) > 2
    assert "\n" not in first + second + other + last


def test_chat_bot_keeps_what_two_people_say_at_once(chat_bot, served):
    async def chat():
        bot = chat_bot(served)
        async with bot.client:
            said = bot.answer("one", "Ann", "a chat"), bot.answer("two", "Ben", "a chat")
            return *await asyncio.gather(*said), bot.chats["a chat"]

    to_ann, to_ben, kept = asyncio.run(chat())
    exchanges = [f"Ann: one\nBot: {to_ann}\n", f"Ben: two\nBot: {to_ben}\n"]
    assert kept in ("".join(exchanges), "".join(exchanges[::-1]))


def test_chat_bot_tells_errors_and_goes_on(chat_bot, served, capsys):
    async def chat():
        bot = chat_bot(served)
        async with bot.client:
            bot.model = "unknown"
            failed = await bot.answer("Hi")
            bot.model = served_model.NAME
            return failed, await bot.answer("Hi")

    failed, answer = asyncio.run(chat())
    assert failed == "I cannot answer now."
    assert "it may be: varied" in capsys.readouterr().err
    assert [answer] == completed(served, "You: Hi\nBot:")  # the chat does not hold the failure


def test_chat_bot_skips_empty_texts(chat_bot, served):
    async def chat(**settings):
        bot = chat_bot(served, **settings)
        async with bot.client:
            return await bot.answer("Hi")

    candidates = ((seed, completed(served, "You: Hi\nBot:", n=8, seed=seed)) for seed in range(50))
    seed, texts = next(found for found in candidates if re.match("[A-Za-z]", found[1][0]))
    stop = texts[0][0]  # so the first text is empty
    expected = [left for text in texts if (left := text.partition(stop)[0])]
    assert asyncio.run(chat(seed=seed, n=8, stop=stop)) == expected[0]
    assert asyncio.run(chat(seed=seed, n=1, stop=stop)) == "..."


def test_chat_bot_chats_on_standard_input(served):
    def chat(address):
        """The bot's answers, and what it told on standard error."""
        command = [sys.executable, EXAMPLES / "chat_bot.py", served_model.NAME, address]
        chat = subprocess.run(
            command, input="Hello\nWhat is new?\n", capture_output=True, text=True, timeout=120
        )
        assert chat.returncode == 0
        return re.findall(r"(?m)^Bot: (.+)$", chat.stdout), chat.stderr

    answers, told = chat(served)
    assert (len(answers), told) == (2, "")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        answers, told = chat(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert answers == ["I cannot answer now."] * 2
    assert told == "no answer: Connection error.\n" * 2


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short_and_show_how_to_load_124m(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 50
    ways = ('download_gpt2(model_name="124M")', "serve --model_name 124M")
    assert any(way in source for way in ways)


def code_cells(path):
    """The notebook's code, without lines for IPython and the shell."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [re.sub(r"(?m)^[%!].*$", "", source) for source in sources]


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs a notebook in a kernel, in an empty folder, with other constants in its first cell."""
    for module in ("ipykernel", "ipywidgets", "matplotlib"):
        pytest.importorskip(module)
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")

    def run_notebook(name, **constants):
        notebook = nbformat.read(EXAMPLES / name, as_version=4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        code[0].source = replace_constants(code[0].source, **constants)
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        monkeypatch.setenv("PYTHONPATH", path.rstrip(os.pathsep))
        place = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=300, resources=place).execute()
        return notebook, code

    return run_notebook


def printed(cell):
    """What a cell wrote to stdout."""
    return "".join(
        output.text
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )


def test_explore_finetuning_compares_models_texts_and_settings(execute):
    _, code = execute("explore_finetuning.ipynb", STEPS=4)
    trained = re.findall(r"(\w+), (\w+) text: best after step (\d) of 4", printed(code[2]))
    pairs = [(model, text) for model in ("small", "larger") for text in ("short", "long")]
    assert [(model, text) for model, text, _ in trained] == pairs
    assert any("image/png" in output.get("data", {}) for output in code[3].outputs)
    found = re.findall(r"(?m)^(\w+) +(\w+) +perplexity +([\d.]+)$", printed(code[4]))
    assert [(model, text) for model, text, _ in found] == pairs
    assert all(float(perplexity) > 1 for *_, perplexity in found)
    assert printed(code[5]).count("-> The ") == 5


def test_large_model_on_small_cards_fits_and_trains(execute, tmp_path):
    _, code = execute("large_on_a_small_card.ipynb", STEPS=2)
    fits = re.findall(r"(\d+) GB: needs ([\d.]+) of ([\d.]+) GB", printed(code[2]))
    assert [int(card) for card, _, _ in fits] == [16, 8, 6]
    assert all(float(need) < float(room) for _, need, room in fits)
    assert (tmp_path / "checkpoint/card_16/model-2.index").is_file()
    assert (tmp_path / "checkpoint/card_6/adapter-2/adapter_config.json").is_file()
    assert "\nThe" in printed(code[4])
    saved = re.findall(r"([\d,]+) MB less with", printed(code[5]))
    assert len(saved) == 3
    assert all(int(mb.replace(",", "")) > 100 for mb in saved)


def replace_fields(source, **fields):
    """A form's source with other values in its fields."""
    for name, value in fields.items():
        source, count = re.subn(
            rf"(?m)^{name} = .*?(?=  # @param)", lambda _, n=name, v=value: f"{n} = {v!r}", source
        )
        assert count == 1, name
    return source


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """Runs cells of the notebook for Colab in a kernel; the Drive is a folder.

    It takes (number of the code cell, other values of its fields) and returns the cells with their
    outputs.
    """
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    drive, modules = tmp_path / "MyDrive", tmp_path / "modules"
    (modules / "google" / "colab").mkdir(parents=True)
    (modules / "google" / "colab" / "__init__.py").write_text("")
    (modules / "google" / "colab" / "drive.py").write_text(
        f"import os\ndef mount(place): os.makedirs({str(drive)!r}, exist_ok=True)\n"
    )
    (modules / "google" / "colab" / "files.py").write_text("def upload(): return {}\n")
    path = [str(REPOSITORY), str(modules), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    monkeypatch.chdir(tmp_path)
    gpt2.create_gpt2(
        model_name="tiny", model_dir=str(drive / "gpt2" / "models"), n_layer=1, n_head=1, n_embd=8,
        n_ctx=32,
    )  # fmt: skip
    (drive / "gpt2" / "text.txt").write_text("A text to learn. " * 50)

    def run_cells(*cells):
        notebook = nbformat.read(EXAMPLES / "colab.ipynb", as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert len(code) == 4
        notebook.cells = []
        for number, fields in cells:
            source = replace_fields(code[number - 1].source, **fields)
            source = source.replace('"/content/drive/MyDrive"', repr(str(drive)))
            notebook.cells.append(nbformat.v4.new_code_cell(source))
        place = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=300, resources=place, allow_errors=True).execute()
        return notebook.cells

    return run_cells


FIELDS = {"select_model": "tiny", "number_of_steps": 12, "sample_every": 5, "save_every": 5}


def error_of(cell):
    """What a cell shows of the error that ended it."""
    return ["".join(o.traceback) for o in cell.outputs if o.output_type == "error"]


def test_colab_form_trains_on_the_drive_and_goes_on_after_a_disconnect(colab, tmp_path):
    few = {"length": 5, "number_of_texts": 2}
    cells = colab((2, {}), (3, FIELDS), (4, few))
    assert [error_of(cell) for cell in cells] == [[], [], []]
    assert (tmp_path / "MyDrive/gpt2/checkpoint/run1/model-12.index").is_file()
    assert (tmp_path / "MyDrive/gpt2/samples/run1").is_dir()
    assert any("image/png" in output.get("data", {}) for output in cells[1].outputs)
    assert "The" in printed(cells[2])
    # Another machine: the run has the steps it was to have.
    again = FIELDS | {"number_of_steps": 15}
    cells = colab(
        (2, {}), (3, FIELDS), (3, again), (3, again | {"restore_from": "Fresh"}), (4, few)
    )
    assert "run run1: step 12" in printed(cells[0])
    assert error_of(cells[1]) == [
        "number_of_steps: run1 has 12 steps already; give more, or restore_from Fresh"
    ]
    assert "Loading checkpoint checkpoint/run1/model-12" in printed(cells[2])
    assert "Saving checkpoint/run1/model-15" in printed(cells[2])
    assert "Loading checkpoint models/tiny/model.ckpt" in printed(cells[3])
    assert error_of(cells[4]) == []


def test_colab_form_writes_rows_of_a_table(colab, tmp_path):
    rows = "joke\n" + "ab\n" * 50
    (tmp_path / "MyDrive/gpt2/jokes.csv").write_text(rows)
    fields = FIELDS | {"training_data": "jokes.csv", "sample_every": 0}
    generating = {"prompt": "<|startoftext|>", "length": 15, "number_of_texts": 100}
    cells = colab((2, {}), (3, fields), (4, generating))
    assert [error_of(cell) for cell in cells] == [[], [], []]
    out = printed(cells[2])
    assert out.count("<|startoftext|>") > 90  # a random text may erase parts of its line
    assert "<|endoftext|>" not in out  # as 1 in 257 random tokens would be


def test_colab_form_tells_wrong_values_in_their_cell(colab):
    wrong = [
        (2, {"working_folder": "../x"}, "working_folder: '../x' must be a name"),
        (2, {"use_google_drive": True}, None),
        (3, {"number_of_steps": 0}, "number_of_steps: 0 must be above 0"),
        (3, {"sample_every": -1}, "sample_every: -1 must be 0"),
        (3, {"save_every": 0}, "save_every: 0 must be above 0"),
        (3, {"session_name": ""}, "session_name: '' must be a name"),
        (3, {"training_data": "x.txt"}, "training_data: there is no 'x.txt' in "),
        (3, {"select_model": "125M"}, "model_name='125M'"),
        (3, {"restore_from": "Last"}, "restore_from: 'Last': give Latest or Fresh"),
        (4, {"session_to_load": "run9"}, "no run in checkpoint/run9"),
        (3, FIELDS, None),
        (4, {"temperature": -1}, "temperature=-1"),
        (4, {"number_of_texts": 0}, "nsamples=0"),
    ]
    cells = colab(*((number, fields) for number, fields, _ in wrong))
    for (_, fields, told), cell in zip(wrong, cells, strict=True):
        error = error_of(cell)
        if told is None:
            assert error == [], fields
        else:
            (sentence,) = error
            assert sentence.startswith(told), fields
            assert "Traceback" not in sentence


def test_notebook_runs_in_a_kernel(execute, tmp_path):
    notebook, code = execute("finetune.ipynb", STEPS=7)
    assert (tmp_path / "checkpoint/notebook/model-7.index").is_file()
    displayed = [
        output.data for cell in code for output in cell.outputs if output.output_type != "stream"
    ]
    assert any("Training:" in data["text/plain"] for data in displayed)
    assert not [o for cell in code for o in cell.outputs if o.get("name") == "stderr"]
    widgets = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    bars = [widget["state"] for widget in widgets.values() if "FloatP" in widget["model_name"]]
    assert any(bar["max"] == bar["value"] == 7 for bar in bars)  # the steps that training took
    assert [data for data in displayed if data.get("image/png", "").startswith("iVBORw0KGgo")]
    assert displayed[-1]["text/plain"].count("The object ") == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_have_explanations_and_no_outputs(path):
    assert path.stat().st_size < 20_000
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) >= (4, 5)
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert kinds[0] == "markdown"
    assert kinds.count("markdown") >= 5
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def misuses(source):
    """The names and arguments of gpt2 that a source uses and that do not exist."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "gpt2":
            if node.attr not in gpt2.__all__:
                found.append(node.attr)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if getattr(node.func.value, "id", "") == "gpt2" and node.func.attr in gpt2.__all__:
            signature = inspect.signature(getattr(gpt2, node.func.attr))
            named = {word.arg: None for word in node.keywords if word.arg is not None}  # not `**`
            try:
                signature.bind(*node.args, **named)
            except TypeError as error:
                found.append(f"{node.func.attr}: {error}")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_use_only_existing_names_and_arguments(path):
    code = "\n".join(code_cells(path))
    assert code.count("gpt2.") >= 7
    assert misuses(code) == []


def test_wrong_names_and_arguments_are_found():
    assert misuses("gpt2.finetune(sess, 'a.txt', steps=3)\ngpt2.plot_history()") == []
    assert misuses("gpt2.tune(sess)") == ["tune"]
    assert "stepz" in misuses("gpt2.finetune(sess, 'a.txt', stepz=3)")[0]
    assert "dataset" in misuses("gpt2.finetune(sess)")[0]
