"""Rules that hold for the whole tree: who imports whom, what is never called, how long a function may be.

Each rule is a function from a module's tree to what breaks it, and is also shown a piece of code that does.

    python -m pytest tests/test_structure.py
"""

import ast
import re
import sys
from pathlib import Path

import pytest

from conftest import ROOT

PACKAGES = ["model", "dataset", "trainer", "scripts", "tests"]
OURS = {*PACKAGES, "conftest", "eval_llm"}
LONGEST = 60  # lines of a function
# the network's forward passes and its list of fields are read as a whole
MAY_BE_LONGER = {"forward", "MiniMindConfig.__init__"}


def modules():
    """Names relative to the root, of all Python files that belong to the project."""
    files = [*ROOT.glob("*.py"), *(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))]
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def source(name):
    return (ROOT / name).read_text(encoding="utf-8")


def imported(tree):
    """(line, dotted name of the module) for each import, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # `from scripts import x` may import the module scripts.x
            yield from ((node.lineno, f"{base}.{alias.name}" if base in OURS else base) for alias in node.names)


def calls(tree):
    """(line, dotted name, call) for each call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), node


def keywords(call):
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


# --- imports ----------------------------------------------------------------------------------------------------------


def within(name, *allowed):
    return any(name == one or name.startswith(one + ".") for one in allowed)


def is_stage(name):
    return name.startswith("trainer.train_") and not within(name, "trainer.train_run")


def may_import(importer, name):
    """Whether a module of the repository may import another one."""
    package, _, file = importer.rpartition("/")
    if within(name, "tests", "conftest", "eval_llm"):
        return package == "tests"
    if package == "tests":
        return True
    if importer == "model/model_minimind.py":
        return False
    if package == "model":
        return within(name, "model")
    if package == "dataset":
        return within(name, "dataset", "model.chat")
    if importer == "trainer/train_run.py":
        return within(name, "model.weights") or (within(name, "trainer") and not is_stage(name))
    if package == "trainer":
        return within(name, "model", "dataset", "trainer") and not is_stage(name)
    # scripts never import scripts; a package below scripts/ and a module without a command line hold data
    if within(name, "scripts"):
        return importer.startswith("scripts/") and (within(name, *DATA_PACKAGES) or is_data(name))
    return within(name, "model", "dataset", "trainer") and not is_stage(name)


# remote code is copied from one folder to another, where only a relative import finds the file beside it
COPIED_TOGETHER = {("model/model_minimind.py", ".packed_attention")}
DATA_PACKAGES = [f"scripts.{file.parent.name}" for file in (ROOT / "scripts").glob("*/__init__.py")]


def is_data(name):
    """A module of scripts/ that nobody runs: it has no command line."""
    file = ROOT.joinpath(*name.split(".")[:2]).with_suffix(".py")
    return file.exists() and "__main__" not in file.read_text(encoding="utf-8")


def forbidden_imports(tree, importer):
    for line, name in imported(tree):
        if (importer, name) in COPIED_TOGETHER:
            continue
        if name.startswith("."):
            yield f"{line}: relative import of {name}"
        elif name.split(".")[0] in OURS and not may_import(importer, name):
            yield f"{line}: imports {name}"
        elif importer == "model/model_minimind.py" and name.split(".")[0] not in {
            "torch",
            "transformers",
            *sys.stdlib_module_names,
        }:
            yield f"{line}: imports {name}, but is copied alone on export"


# --- calls and statements ---------------------------------------------------------------------------------------------


def unsafe_loads(tree, importer):
    for line, name, call in calls(tree):
        if name == "torch.load" and keywords(call).get("weights_only") != "True":
            yield f"{line}: torch.load without weights_only=True"
        if re.fullmatch(r"(c?pickle|dill|joblib|marshal)\.loads?", name) and not importer.startswith("tests/"):
            yield f"{line}: {name}"
        if keywords(call).get("allow_pickle") == "True":
            yield f"{line}: {name}(allow_pickle=True)"


def evaluated_code(tree, importer):
    for line, name, _ in calls(tree):
        if name in ("eval", "exec", "builtins.eval", "builtins.exec", "os.system"):
            yield f"{line}: {name}()"


def shell_commands(tree, importer):
    for line, name, call in calls(tree):
        if keywords(call).get("shell") == "True":
            yield f"{line}: {name}(shell=True)"


def bare_excepts(tree, importer):
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{node.lineno}: bare except"


def wholesale_silence(tree, importer):
    """Ignoring every warning; one named by its message or category is a decision, all of them are a blindfold."""
    for line, name, call in calls(tree):
        if re.search(r"\b(filterwarnings|simplefilter)$", name) and call.args:
            chosen = len(call.args) > 1 or {"message", "category", "module"} & set(keywords(call))
            if ast.unparse(call.args[0]) == "'ignore'" and not chosen:
                yield f"{line}: {name}('ignore')"


def missing_docstring(tree, importer):
    if tree.body and not ast.get_docstring(tree):
        yield "1: no module docstring"


def long_functions(tree, importer):
    for owner in ast.walk(tree):
        for node in ast.iter_child_nodes(owner):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                full = f"{owner.name}.{node.name}" if isinstance(owner, ast.ClassDef) else node.name
                length = node.end_lineno - node.lineno + 1
                exempt = importer == "model/model_minimind.py" and MAY_BE_LONGER & {full, node.name}
                if length > LONGEST and not exempt:
                    yield f"{node.lineno}: {full} has {length} lines"


def text_without_encoding(tree, importer):
    """Windows reads and writes another encoding than UTF-8 where none is named."""
    for line, name, call in calls(tree):
        mode = ast.unparse(call.args[1]) if len(call.args) > 1 else keywords(call).get("mode", "")
        bare = name == "open" and "b" not in mode and "gb" not in mode
        if (bare or name.endswith((".read_text", ".write_text"))) and "encoding" not in keywords(call):
            if not (name.endswith(".read_text") and call.args) and importer.split("/")[0] != "tests":
                yield f"{line}: {name} without encoding"


RULES = {
    forbidden_imports: "from scripts.quickstart import main",
    unsafe_loads: "import torch\ntorch.load('a.pth', map_location='cpu')",
    evaluated_code: "print(eval('1 + 1'))",
    shell_commands: "subprocess.run('ls', shell=True)",
    bare_excepts: "try:\n    pass\nexcept:\n    pass",
    wholesale_silence: "import warnings\nwarnings.filterwarnings('ignore')",
    missing_docstring: "import os",
    long_functions: "class A:\n    def f(self):\n" + "        pass\n" * 60,
    text_without_encoding: "open('a.txt').read()",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds_everywhere(rule):
    broken = [f"{name}:{what}" for name in modules() for what in rule(ast.parse(source(name)), name)]
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_sees_what_breaks_it(rule):
    assert len(list(rule(ast.parse(RULES[rule]), "trainer/train_pretrain.py"))) == 1
    assert not list(rule(ast.parse('"""Fine."""\nimport torch\n'), "trainer/train_pretrain.py"))


@pytest.mark.parametrize(
    "importer, code, allowed",
    [
        ("model/model_minimind.py", "import torch.nn.functional, math\nfrom transformers.utils import x", True),
        ("model/model_minimind.py", "from model.presets import V3", False),
        ("model/model_minimind.py", "import numpy", False),
        ("model/model_minimind.py", "from .packed_attention import can_attend", True),
        ("model/model_minimind.py", "from .weights import load_model", False),
        ("model/weights.py", "from model.presets import V3\nimport numpy", True),
        ("model/weights.py", "from trainer.arguments import ROOT", False),
        ("dataset/lm_dataset.py", "from model.chat import render\nfrom dataset import jsonl", True),
        ("dataset/lm_dataset.py", "from model import chat", True),
        ("dataset/lm_dataset.py", "from model.weights import load_model", False),
        ("trainer/train_run.py", "from model.weights import load_model\nfrom trainer.monitor import Monitor", True),
        ("trainer/train_run.py", "from model.model_minimind import MiniMindConfig", False),
        ("trainer/train_run.py", "from dataset.packing import Collator", False),
        ("trainer/train_run.py", "from trainer.train_pretrain import main", False),
        ("trainer/train_dpo.py", "from trainer.train_run import TrainRun\nfrom model import chat", True),
        ("trainer/train_dpo.py", "from trainer import train_full_sft", False),
        ("trainer/train_dpo.py", "def f():\n    from scripts.quickstart import main", False),
        ("scripts/quickstart.py", "from model.chat import render\nfrom trainer.arguments import ROOT", True),
        ("scripts/quickstart.py", "from trainer.train_pretrain import main", False),
        ("scripts/bench_record.py", "from trainer.train_run import TrainRun", True),
        ("scripts/generate_sample_data.py", "from scripts.sample_data.world import COUNTRIES", True),
        ("scripts/generate_sample_data.py", "from scripts.quickstart import main", False),
        ("scripts/generate_sample_data.py", "from scripts import quickstart", False),
        ("eval_llm.py", "from model import chat", True),
        ("eval_llm.py", "from scripts.quickstart import main", False),
        ("eval_llm.py", "from tests.conftest import ROOT", False),
        ("model/chat.py", "from . import weights", False),
        ("tests/test_model.py", "from conftest import ROOT\nfrom scripts import quickstart", True),
    ],
)
def test_who_may_import_whom(importer, code, allowed):
    assert (not list(forbidden_imports(ast.parse(code), importer))) == allowed


def test_warnings_may_be_ignored_by_name():
    code = "warnings.filterwarnings('ignore', message='x')\nwarnings.simplefilter('error')"
    assert not list(wholesale_silence(ast.parse(code), "a.py"))


def test_nine_in_ten_functions_are_short():
    lengths = [
        node.end_lineno - node.lineno + 1
        for name in modules()
        for node in ast.walk(ast.parse(source(name)))
        if isinstance(node, ast.FunctionDef)
    ]
    assert sum(length <= 30 for length in lengths) >= 0.9 * len(lengths) > 90


# --- files ------------------------------------------------------------------------------------------------------------

TEXT = {".py", ".md", ".txt", ".toml", ".yml", ".yaml", ".jinja", ".sh", ".cfg", ""}
SKIPPED = {".git", ".venv", ".compat", ".pytest_cache", ".ruff_cache", "__pycache__", "docs", "out", "checkpoints"}
# an absolute path below somebody's home or workplace: not part of a relative path, of a URL or of a word
OWN_PATH = re.compile(r"(?<![\w.}/-])(/(home|work|root|Users)/\w+|[A-Z]:\\+Users\\+\w+)")


def text_files():
    for folder, names in ((ROOT, ROOT.iterdir()), *((ROOT / p, (ROOT / p).rglob("*")) for p in [*PACKAGES, ".ci"])):
        for file in names if folder.exists() else []:
            skipped = SKIPPED & set(file.relative_to(ROOT).parts)
            if file.is_file() and not file.is_symlink() and file.suffix in TEXT and not skipped:
                yield file


def test_no_file_names_a_path_of_one_machine():
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for file in text_files()
        if file != Path(__file__).resolve()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if OWN_PATH.search(line)
    ]
    assert not found, "\n" + "\n".join(found)
    for bad in ("cd /home/me/minimind", "'/work/project/model'", r"C:\\Users\\me"):
        assert OWN_PATH.search(bad)
    for fine in ("https://example.org/home/page", "a/work/b", "../root/x", "/homework/1"):
        assert not OWN_PATH.search(fine)
    assert len(list(text_files())) > 30


def test_every_file_is_utf8_with_unix_line_ends():
    for file in text_files():
        content = file.read_bytes()
        content.decode("utf-8")
        assert b"\r\n" not in content and not content.startswith(b"\xef\xbb\xbf"), file
