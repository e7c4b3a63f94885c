"""README.md and docs/: their code blocks run, and their names, flags and links exist.

A document's blocks run one after the other, as a reader would paste them, in a folder with the
texts that they name. Downloads give a tiny model, and long calls are cut short.
"""

import ast
import functools
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import hub_server
import pytest
from reference import TRANSFORMERS

import gpt_2_simple as gpt2
from gpt_2_simple.cli.commands import COMMANDS, LEGACY_FLAGS
from gpt_2_simple.cli.main import main
from gpt_2_simple.cli.parser import parse

ROOT = Path(__file__).parent.parent
REFERENCE = os.environ.get(TRANSFORMERS)
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MAKE_TARGET = re.compile(r"^([a-z]+):", re.MULTILINE)

# The largest values that calls in the documents get. Their results have the same form.
LIMITS = {
    "finetune": {"steps": 2, "epochs": 0.05, "sample_length": 4, "val_batch_count": 1},
    "generate": {"length": 4},
    "generate_to_file": {"length": 4},
    "generate_stream": {"length": 4},
}
# The server in the documents; theirs take ports that are free.
SERVER = "http://127.0.0.1:8000"
# Functions that need Google Colab: only their arguments are checked.
DRIVE = [name for name in gpt2.__all__ if name.endswith("gdrive")]


class Block(NamedTuple):
    """A fenced block: its language tag and its text."""

    language: str
    text: str


def blocks_of(path):
    return [Block(*found) for found in BLOCK.findall(path.read_text(encoding="utf-8"))]


def prose_of(path):
    return BLOCK.sub("", path.read_text(encoding="utf-8"))


def shortened(function, limits):
    """The function, with arguments cut to their limits."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def short(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, limit in limits.items():
            value = bound.arguments[name]
            if value is not None and value > 0:
                bound.arguments[name] = min(value, limit)
        return function(*bound.args, **bound.kwargs)

    return short


def without_effect(function):
    """A function that takes the same arguments and does nothing."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args, **kwargs):
        signature.bind(*args, **kwargs)

    return checked


@pytest.fixture
def replace_everywhere(monkeypatch):
    """Replaces a public function in each module of the package that holds it."""
    importlib.import_module("gpt_2_simple.gpt_2")

    def replace(name, replacement):
        function = getattr(gpt2, name)
        monkeypatch.setattr(gpt2, name, replacement, raising=False)
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("gpt_2_simple.") and vars(module).get(name) is function:
                monkeypatch.setattr(module, name, replacement)

    return replace


@pytest.fixture
def hub(monkeypatch):
    """A hub of Hugging Face on this machine, for this process."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_server.serve() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield running


@pytest.fixture
def reader(workplace, tiny_source, hub, monkeypatch, replace_everywhere):
    """A current folder with the texts that the documents name, and functions that are quick."""

    signature = inspect.signature(gpt2.download_gpt2)

    @functools.wraps(gpt2.download_gpt2)
    def download(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        folder = Path(bound.arguments["model_dir"], bound.arguments["model_name"])
        shutil.copytree(tiny_source / "tiny", folder, dirs_exist_ok=True)

    replace_everywhere("download_gpt2", download)
    for name, limits in LIMITS.items():
        replace_everywhere(name, shortened(getattr(gpt2, name), limits))
    launch = shortened(gpt2.distributed.launch, LIMITS["finetune"])
    monkeypatch.setattr(gpt2.distributed, "launch", launch, raising=False)
    for name in DRIVE:
        replace_everywhere(name, without_effect(getattr(gpt2, name)))
    monkeypatch.setenv("GPT_2_SIMPLE_CACHE", str(workplace / "cache"))
    text = (workplace / "text.txt").read_text(encoding="utf-8")
    for name in ("shakespeare.txt", "novels/one.txt", "novels/two.txt", "poems/one.txt"):
        path = workplace / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    rows = "".join(f"ann,{line}\n" for line in text.replace(",", "").splitlines())
    (workplace / "tweets.csv").write_text(f"user,text\n{rows}", encoding="utf-8")
    (workplace / "examples").mkdir()
    for name in ("jokes.csv", "chat_bot.py"):
        shutil.copy(ROOT / "examples" / name, workplace / "examples")
    (workplace / "titles.txt").write_text("One\nTwo\n", encoding="utf-8")
    return workplace


def run_python(text, namespace):
    exec(compile(text, "a block of Python", "exec"), namespace)


class Server(NamedTuple):
    """A server that a document's line started in the background."""

    process: subprocess.Popen
    address: str


def start_server(arguments):
    command = [sys.executable, "-u", "-m", "gpt_2_simple", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("Serving "):
            return Server(process, line.split()[3])
    raise AssertionError(f"the server ended with {process.wait()}")


def end_server(server):
    server.process.terminate()
    server.process.communicate(timeout=60)
    return server.process.returncode


def ask_server(line, server):
    """What a line of the shell prints that asks the server of its document."""
    assert SERVER in line, line
    line = line.replace(SERVER, server.address)
    folders = [str(Path(sys.executable).parent), os.environ["PATH"]]
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        env={**os.environ, "PATH": os.pathsep.join(folders)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_with_server(line, words, servers):
    """Runs a line that starts a server, asks one or ends it."""
    program, *arguments = words
    if program == "gpt_2_simple":
        servers.append(start_server(arguments[:-1]))
    elif program == "curl":
        assert json.loads(ask_server(line, servers[-1]))["choices"], line
    elif program == "echo":
        assert ask_server(line, servers[-1]).strip(), line
    else:
        assert words == ["kill", "%1"]
        status = end_server(servers.pop())
        assert status == 0 or sys.platform == "win32"  # which has no SIGTERM


def run_shell(text, servers=()):
    """Runs the library's commands and searches; checks make's targets and benchmarks' flags.

    Servers that it starts join `servers`; lines that ask one ask the last.
    """
    for line in text.replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        program, *arguments = words
        if program in ("curl", "echo", "kill") or words[-1] == "&":
            run_with_server(line, words, servers)
        elif program == "gpt_2_simple":
            assert main(arguments) == 0, line
        elif program == "make":
            targets = MAKE_TARGET.findall((ROOT / "Makefile").read_text(encoding="utf-8"))
            assert {word for word in arguments if "=" not in word} <= set(targets), line
        elif program in ("grep", "tr"):
            assert subprocess.run(["bash", "-c", f"set -o pipefail; {line}"]).returncode in (0, 1)
        elif words[:1] == ["python"] and arguments[0].startswith("benchmarks/"):
            check_benchmark(arguments)
        else:
            raise AssertionError(f"cannot run {line!r}: give the block the tag text")


def check_benchmark(arguments):
    """Fails if there is no such benchmark, or if it has no such flag."""
    script, *flags = arguments
    source = (ROOT / script).read_text(encoding="utf-8")
    for flag in flags:
        assert not flag.startswith("--") or f'"{flag}"' in source, (script, flag)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_code_blocks_run(path, reader):
    tf = importlib.import_module("tensorflow")
    namespace, servers = {}, []
    try:
        for block in blocks_of(path):
            if block.language == "python":
                run_python(block.text, namespace)
            elif block.language == "sh":
                run_shell(block.text, servers)
            else:
                assert block.language == "text"
        assert not servers, "a document leaves a server behind"
    finally:
        for server in servers:
            end_server(server)
        for value in namespace.values():
            if isinstance(value, tf.compat.v1.Session):
                value.close()


def test_what_the_documents_push_is_on_the_hub(reader, hub):
    (path,) = [path for path in DOCUMENTS if path.name == "use_it.md"]
    pushes = [text for language, text in blocks_of(path) if language == "sh" and " push " in text]
    run_shell("gpt_2_simple finetune shakespeare.txt --steps 1")
    run_shell(*pushes)
    assert set(hub.repos["me/bard"]["files"]) >= {"model.safetensors", "config.json", "README.md"}
    assert hub.repos["me/bard"]["private"]


@pytest.mark.parametrize(
    "block",
    [
        "gpt2.finetune(sess, 'shakespeare.txt', stepz=3)",
        "gpt2.generate(sess, lenght=3)",
        "gpt2.download_gpt2(name='124M')",
        "gpt2.copy_file_to_gdrive(file='a.txt')",
    ],
)
def test_a_wrong_argument_in_a_python_block_fails(block, reader):
    with pytest.raises(TypeError):
        run_python(block, {"gpt2": gpt2, "sess": None})


@pytest.mark.parametrize(
    "block",
    [
        "gpt_2_simple finetune shakespeare.txt --stepz 3",
        "gpt_2_simple tune shakespeare.txt",
        "make tests",
        "python benchmarks/memory.py --tables",
        "pip install gpt_2_simple",
    ],
)
def test_a_wrong_argument_in_a_shell_block_fails(block, reader):
    with pytest.raises(AssertionError):
        run_shell(block)


def test_benchmark_commands_in_sentences_have_their_flags():
    commands = [
        command.split()[1:]
        for path in DOCUMENTS
        for command in re.findall(r"`(python benchmarks/[^`]+)`", prose_of(path))
    ]
    assert len(commands) >= 7
    for command in commands:
        check_benchmark(command)


def settings_tables():
    """(function, first cell) of each row of a table whose heading is "setting of `function`"."""
    for path in DOCUMENTS:
        function = None
        for line in prose_of(path).splitlines():
            cell = line.split(" | ")[0].removeprefix("| ")
            if not line.startswith("|"):
                function = None
            elif found := re.fullmatch(r"setting of `(\w+)`", cell):
                function = found[1]
            elif function and not line.startswith("|---"):
                yield function, cell


def test_settings_tables_name_parameters_with_their_defaults():
    rows = list(settings_tables())
    assert {function for function, _ in rows} == {"finetune", "generate", "serve"}
    for function, cell in rows:
        parameters = inspect.signature(getattr(gpt2, function)).parameters
        for setting in re.findall(r"`([^`]+)`", cell):
            name, equals, value = setting.partition("=")
            assert name in parameters, (function, setting)
            if equals:
                assert ast.literal_eval(value) == parameters[name].default, (function, setting)


# A table's cells: what is escaped does not end one.
CELL = re.compile(r"(?<!\\)\|")
SPAN = re.compile(r"`([^`]+)`")


class Row(NamedTuple):
    """A row of a table: its cells by their headings."""

    cells: dict[str, str]

    def spans(self, heading):
        return [span.replace("\\|", "|") for span in SPAN.findall(self.cells[heading])]


def rows_of(text):
    """The rows of all tables of a document's prose."""
    heading = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in CELL.split(line)[1:-1]]
        if not cells:
            heading = None
        elif heading is None:
            heading = cells
        elif set(line) - set("|-"):
            yield Row(dict(zip(heading, cells, strict=True)))


def check_calls(code):
    """Fails if code calls a public function that is not there, or with other arguments than it has.

    Returns the number of calls of public functions.
    """
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    for call in calls:
        name = ast.unparse(call.func).removeprefix("gpt2.")
        assert name in gpt2.__all__, code
        signature = inspect.signature(getattr(gpt2, name))
        signature.bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})
    return len(calls)


def check_command(line):
    """Fails if the command line does not take a command."""
    program, *arguments = shlex.split(line)
    assert program == "gpt_2_simple", line
    try:
        parse(COMMANDS, arguments, LEGACY_FLAGS)
    except SystemExit:
        raise AssertionError(f"wrong usage: {line}") from None


def is_shell(code):
    return code.startswith("gpt_2_simple ")


def test_calls_beside_those_of_other_libraries_are_right():
    rows = [row for row in rows_of(prose_of(ROOT / "docs/coming_from.md")) if "here" in row.cells]
    assert len(rows) >= 40
    for row in rows:
        for code in row.spans("here"):
            if is_shell(code):
                check_command(code)
            elif not check_calls(code):
                assert code in gpt2.__all__ or code == "length", code
        for code in row.spans("there"):  # 0.8.1's names are ours
            if is_shell(code):
                check_command(code)
            elif code.startswith("gpt2."):
                check_calls(code)


def arguments_beside_others():
    """(their function, our function, the row) of each row that compares arguments."""
    for row in rows_of(prose_of(ROOT / "docs/coming_from.md")):
        headings = [re.fullmatch(r"argument of `([\w.]+)`", heading) for heading in row.cells]
        if headings[0] and headings[1]:
            yield headings[0][1], headings[1][1], row


def test_arguments_beside_those_of_other_libraries_have_their_defaults():
    compared = list(arguments_beside_others())
    assert {ours for _, ours, _ in compared} == {"finetune", "generate"}
    for _, ours, row in compared:
        parameters = inspect.signature(getattr(gpt2, ours)).parameters
        settings = row.spans(f"argument of `{ours}`")
        assert settings, row
        for setting in settings:
            name, equals, value = setting.partition("=")
            assert parameters[name].default == (ast.literal_eval(value) if equals else None), row
        for code in row.spans("difference"):
            check_calls(code if "(" in code or "=" not in code else f"{ours}(0, 0, {code})")


@pytest.mark.parametrize(
    "code",
    [
        "gpt2.finetunes(sess)",
        "gpt2.finetune(sess, 'text.txt', stepz=3)",
        "gpt2.finetune()",
        "gpt2.generate(sess, prefix='a', prefix_file='b')[0]",
        "load_gpt2(sess, best=True)",
    ],
)
def test_a_wrong_call_in_a_table_fails(code):
    with pytest.raises((AssertionError, TypeError)):
        check_calls(code)


@pytest.mark.parametrize("line", ["gpt_2_simple tune text.txt", "gpt_2_simple generate --n 3"])
def test_a_wrong_command_in_a_table_fails(line):
    with pytest.raises(AssertionError):
        check_command(line)


@pytest.mark.transformers
@pytest.mark.skipif(not REFERENCE, reason=f"{TRANSFORMERS} names no Python with transformers")
def test_arguments_of_transformers_are_there():
    theirs = {"TrainingArguments": set(), "model.generate": set()}
    for function, _, row in arguments_beside_others():
        if function in theirs:
            spans = row.spans(f"argument of `{function}`")
            theirs[function] |= {span.partition("=")[0] for span in spans if "(" not in span}
    code = (
        "import inspect, transformers as t\n"
        "training = set(inspect.signature(t.TrainingArguments).parameters)\n"
        "generating = {*t.GenerationConfig().to_dict(), 'assistant_model'}\n"
        f"print({theirs['TrainingArguments']} - training, {theirs['model.generate']} - generating)"
    )
    result = subprocess.run([REFERENCE, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["set()", "set()"]


# Modules whose errors and warnings all have an entry in docs/troubleshooting.md.
EXPLAINED = [
    "cli/folder_commands.py", "common/folders.py", "common/locks.py", "data/tables.py",
    "data/text_files.py", "serving/api.py", "serving/guard.py", "serving/launch.py",
    "serving/server.py", "session.py", "storage/adapter_base.py", "storage/checkpoint.py",
    "storage/checkpoint_manager.py", "storage/checkpoint_ops.py", "storage/load.py",
    "storage/rename_remove.py", "storage/runs.py", "training/lora.py", "training/memory_plan.py",
    "training/run_logger.py", "training/trainer.py",
]  # fmt: skip
# The section of docs/troubleshooting.md with messages that are not this library's.
FOREIGN = "## TensorFlow"
HOLE = "…"


def text_of(node):
    """A string of the source, or None: what is filled in is a hole, and holes in a row are one."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [v.value if isinstance(v, ast.Constant) else HOLE for v in node.values]
        return re.sub(f"{HOLE}+", HOLE, "".join(parts))
    return None


@functools.cache
def source_of(path):
    return ast.parse((ROOT / "gpt_2_simple" / path).read_text(encoding="utf-8"))


def messages_of(path):
    """The errors and warnings that a module raises with at least three words of its own."""
    for node in ast.walk(source_of(path)):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call):
            continue
        is_warning = ast.unparse(call.func) in ("warn", "report.warn", "report.warnings.append")
        if call is not node or is_warning:
            texts = map(text_of, call.args)
            yield from (text for text in texts if text and len(re.findall(r"[a-z]{2,}", text)) > 2)


@functools.cache
def strings_of_the_package():
    """All strings of the source but docstrings."""
    found = set()
    for path in sorted((ROOT / "gpt_2_simple").rglob("*.py")):
        tree = source_of(path.relative_to(ROOT / "gpt_2_simple"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found |= {text_of(node) for node in ast.walk(tree) if id(node) not in docs}
    return found - {None}


@functools.cache
def entries():
    """The first words of messages that docs/troubleshooting.md explains."""
    sections = prose_of(ROOT / "docs/troubleshooting.md").split("\n## ")
    own = [section for section in sections if f"## {section}".split("\n")[0] != FOREIGN]
    assert len(own) == len(sections) - 1
    return [words for section in own for row in rows_of(section) for words in row.spans("message")]


@pytest.mark.parametrize("words", entries())
def test_a_message_of_the_troubleshooting_page_is_in_the_source(words):
    assert [text for text in strings_of_the_package() if text.startswith(words)]


@pytest.mark.parametrize("path", EXPLAINED)
def test_the_troubleshooting_page_explains_every_message_of_a_module(path):
    messages = list(messages_of(path))
    assert messages
    missing = [text for text in messages if not text.startswith(tuple(entries()))]
    assert missing == []


def test_the_readme_is_short_and_names_every_function_and_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    named = set(re.findall(r"`(\w+)`", readme))
    functions = {name for name in gpt2.__all__ if inspect.isfunction(getattr(gpt2, name))}
    assert functions - named == {"cmd", "get_tarfile_name"}  # nobody calls these but scripts
    assert set(COMMANDS) <= named


def anchors_of(path):
    """The anchors that GitHub gives the headings of a document."""
    headings = HEADING.findall(prose_of(path))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link in LINK.findall(prose_of(path)):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link
