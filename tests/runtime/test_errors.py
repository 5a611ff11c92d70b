"""What a command says of bad input: one line that names it, no traceback, and a status that is not 0."""

import json
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from mixgrpo_jax import config as configs
from mixgrpo_jax.models import families
from mixgrpo_jax.runtime import app
from tests.python import ROOT, run_program

PROGRAM = """
import contextlib, io, json, sys
from absl import flags
from mixgrpo_jax import config as configs
from mixgrpo_jax.runtime import app

app.config_flag()


def main(_):
    print(configs.resolve(flags.FLAGS.config).arithmetic())


said = []
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    flags.FLAGS.unparse_flags()
    flags.FLAGS["config"].value, status = None, 0
    with contextlib.redirect_stderr(io.StringIO()) as lines:
        try:
            app.run(main)
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException as error:
            status = repr(error)
    said.append((status, lines.getvalue()))
print(json.dumps(said))
"""
RECIPE = """
from mixgrpo_jax import config as configs


def get_config():
    config = configs.base()
    {}
    return config
"""


def recipe(tmp_path, line, name="mine"):
    file = tmp_path / f"{name}.py"
    file.write_text(RECIPE.format(line))
    return f"--config={file}"


def test_bad_flags_and_recipes_end_in_one_line(tmp_path):
    signs, written = "--config=configs/signs.py", lambda line, name: recipe(tmp_path, line, name)
    cases = [
        ([], "--config is missing: a recipe, as configs/quickstart.py"),
        (["--config=configs/sings.py"], "configs/sings.py: there is no such file; did you mean configs/signs.py?"),
        (["--config=configs"], "--config=configs: there is no such file; give a file that has get_config()"),
        ([signs, "--config.nope=1"], "--config.nope=1: there is no field nope; choose from advantage, averages,"),
        ([signs, "--config.optimizer.b3=1"], "b3=1: there is no field optimizer.b3; did you mean optimizer.b2?"),
        ([signs, "--config.rewards.function=1.0"], "there is no field rewards.function;", "config.rewards.function ="),
        ([signs, "--config.plan.seed=1"], "--config.plan.seed=1: plan.seed is now seed"),
        ([signs, "--config.plan.length.x=1"], "--config.plan.length.x=1: plan.length is a value, and has no fields"),
        ([signs, "--config.iterations=x"], "--config.iterations=x: it must be a whole number"),
        ([signs, "--config.optimizer.b1=x"], "--config.optimizer.b1=x: it must be a number"),
        ([signs, "--cofnig.seed=1"], "cofnig.seed"),
        ([signs, "--config.batch.group=1"], "batch.group=1: a group of one has no advantage; use at least 2"),
        ([signs, "--config.model.image_size=(1,2,3)"], "model.image_size=(1, 2, 3): it must be a tuple of 2"),
        ([written("config.optimizer.b1 = None", "none")], "optimizer.b1=None: it must be a number"),
        ([written("config.plan.lenght = 3", "typo")], "plan.lenght is no field of Window, did you mean length?"),
        ([written("config.sede = 3", "top")], "sede=3: the config has no such field, did you mean seed?"),
        ([written("config.batch = 3", "flat")], "flat.py: line 7: TypeError: "),
        ([written("config.seed = nope", "name")], "name.py: line 7: NameError: name 'nope' is not defined"),
        ([written("config.seed = = 1", "syntax")], "syntax.py: SyntaxError: invalid syntax (syntax.py, line 7)"),
        ([written("config.plan = configs.choose('plan', 'windw')", "choose")], "choose.py: line 7: plan.name='windw'"),
        ([written("return {}", "dict")], "dict.py: get_config() returns dict: return a config"),
    ]
    printed = run_program(PROGRAM, json.dumps([case[0] for case in cases]), cwd=ROOT)
    for (arguments, *expected), (status, said) in zip(cases, json.loads(printed.splitlines()[-1]), strict=True):
        assert status == 1 and said.startswith("ERROR: ") and said.count("\n") == 1, (arguments, status, said)
        assert all(text in said for text in expected), (arguments, said)


@pytest.mark.parametrize("debug", [False, True])
def test_a_command_ends_in_one_line_and_debug_keeps_the_traceback(debug, tmp_path):
    command = [sys.executable, "-m", "mixgrpo_jax.train", f"--workdir={tmp_path}", *["--debug"] * debug]
    flaw = "--config.model.folder=/not/there"
    done = subprocess.run([*command, "--config=configs/signs.py", flaw], cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 1
        and "model.folder='/not/there': there is no such file or folder" in done.stderr.splitlines()[-1]
    )
    assert ("Traceback" in done.stderr) == debug and (debug or len(done.stderr.splitlines()) == 1)


def raised(act):
    with pytest.raises(Exception) as caught:
        act()
    return caught.value


def test_what_this_package_raises_and_the_system_refuses_is_bad_input(tmp_path):
    error = raised(lambda: configs.choose("plan", "windw"))
    error.add_note("This is of the plan.")
    assert app.describe(error) == f"{error} This is of the plan."
    assert app.describe(raised((tmp_path / "nothing").read_text)).endswith(f"'{tmp_path / 'nothing'}'")
    assert app.describe(flags.IllegalFlagValueError("flag --batch=two\nlines")) == "flag --batch=two lines"


def test_a_fault_of_the_program_keeps_its_traceback():
    for act in (lambda: np.zeros(3).reshape(2), lambda: int("x"), lambda: configs.near(*[1, 2, 3]), lambda: {}["x"]):
        assert app.describe(raised(act)) is None
    assert app.describe(raised(lambda: configs.share("a", 1, 1))) is None  # in the package, and not raised by it
    assert app.describe(ValueError("never raised")) is None


@pytest.mark.parametrize(
    ("part", "text", "message"),
    [
        ("transformer", "{", "is not JSON"),
        ("transformer", "[]", "holds a list and no object"),
        ("transformer", {"num_layers": "two"}, "has num_layers='two', which should be as 19 is"),
        ("transformer", {"num_attention_heads": -1}, "has num_attention_heads=-1, which should be none below 0"),
        ("transformer", {"axes_dims_rope": [1, 1]}, r"axes_dims_rope=\(1, 1\) must be even"),
        ("transformer", {"axes_dims_rope": ["a"]}, r"has axes_dims_rope=\('a',\), which should be as"),
        ("transformer", {"_class_name": ["FluxTransformer2DModel"]}, r"has _class_name=\['Flux.* no known family"),
        ("transformer", {"_class_name": None}, "has _class_name=None, no known family"),
        ("text_encoder_2", {"d_model": None}, "has d_model=None"),
        ("text_encoder_2", "", "is not JSON"),
    ],
)
def test_a_broken_config_of_a_model_is_named(small_policy, tmp_path, part, text, message):
    for source in small_policy.rglob("*"):
        if source.is_file():
            target = tmp_path / source.relative_to(small_policy)
            target.parent.mkdir(exist_ok=True, parents=True)
            target.write_bytes(source.read_bytes())
    file = tmp_path / part / "config.json"
    if isinstance(text, dict):
        text = json.dumps(json.loads(file.read_text()) | text)
    file.write_text(text)
    with pytest.raises(ValueError, match=f"{file}:? {message}"):
        families.read_parts(tmp_path)


def test_a_broken_tokenizer_is_named(small_policy, tmp_path):
    (tmp_path / "tokenizer_2").mkdir()
    (tmp_path / "tokenizer_2" / "tokenizer.json").write_text("{")
    family = families.of(small_policy / "transformer")
    with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer_2 holds no tokenizer that can be read"):
        families.read_tokenizers(family, tmp_path, ["text_encoder_2"])
