"""Each example runs, with fewer steps."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_demo_trains_and_writes(tmp_path, monkeypatch, capsys):
    source = (EXAMPLES / "demo.py").read_text(encoding="utf-8")
    assert "STEPS = 400\n" in source
    script = tmp_path / "demo.py"
    script.write_text(source.replace("STEPS = 400\n", "STEPS = 3\n"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    out = capsys.readouterr().out
    assert "Saving checkpoint/demo/model-3" in out
    entropy = float(out.partition("Unigram entropy of the text: ")[2].split()[0])
    loss = float(out.partition("Loss on text it never saw:")[2].split()[0])
    assert 3 < entropy < 3.5
    assert loss > entropy  # three steps teach nothing yet
    assert "\nThe " in out
