"""The sandbox stops loops, bombs and orphans, hides the environment, and says honestly what it does not guard."""

import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import ROOT, run_script
from model import sandbox
from model.sandbox import active_guards, extract_code, run_python

needs_posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no resource limits")


def guard(name):
    return next(line for line in active_guards() if line.startswith(name + ":"))


def test_output_and_exit_code_come_back():
    result = run_python("import sys\nprint('out')\nprint('err', file=sys.stderr)\nsys.exit(3)")
    assert (result.returncode, result.stdout, result.stderr) == (3, "out\n", "err\n")
    assert not result.ok and not result.timed_out and not result.truncated
    assert run_python("print(1)").ok


def test_exception_and_syntax_error_are_the_programs_failure():
    failed = run_python("assert 1 == 2, 'unequal'")
    assert failed.returncode == 1 and "AssertionError: unequal" in failed.stderr
    broken = run_python("def f(:\n")
    assert broken.returncode == 1 and "SyntaxError" in broken.stderr
    assert run_python("x = 1\x00").returncode == 1


def test_unicode_survives_in_both_directions():
    result = run_python("print('斐波那契', input(), 'é🙂')", stdin="输入 ü\n")
    assert result.stdout == "斐波那契 输入 ü é🙂\n"
    assert run_python("print('\ud800')").stdout == "?\n"  # a lone surrogate has no UTF-8 form


def test_stdin_is_given_or_empty():
    code = "import sys\nprint(repr(sys.stdin.read()))"
    assert run_python(code).stdout == "''\n"
    assert run_python(code, stdin="1 2\n3").stdout == "'1 2\\n3'\n"
    assert run_python("print(len(input()))", stdin="x" * 300_000 + "\n").stdout == "300000\n"


def test_endless_loop_is_stopped_in_time():
    result = run_python("print('begun', flush=True)\nwhile True:\n    pass", timeout=1.0)
    assert result.timed_out and not result.ok
    assert result.stdout == "begun\n"
    assert result.seconds < 3.0


def test_sleeping_program_without_output_is_stopped():
    result = run_python("import os, time\nos.close(1)\nos.close(2)\ntime.sleep(60)", timeout=0.5)
    assert result.timed_out and result.seconds < 3.0


@needs_posix
@pytest.mark.parametrize("ending", ["", "\ntime.sleep(60)"], ids=["parent ends", "parent hangs"])
def test_forked_child_does_not_outlive(tmp_path, ending):
    heartbeat = tmp_path / "heartbeat"
    code = f"""
import os, time
if os.fork() == 0:
    for _ in range(600):
        with open({str(heartbeat)!r}, "a") as file:
            file.write("x")
        time.sleep(0.05)
time.sleep(0.3){ending}
"""
    result = run_python(code, timeout=1.0)
    assert result.timed_out == bool(ending) and result.seconds < 3.0
    size = heartbeat.stat().st_size
    assert size > 0
    time.sleep(0.3)
    assert heartbeat.stat().st_size == size


@needs_posix
def test_child_with_a_session_of_its_own_does_not_outlive_or_block(tmp_path):
    heartbeat = tmp_path / "heartbeat"
    code = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    for _ in range(60):
        open({str(heartbeat)!r}, "a").write("x")
        time.sleep(0.05)
else:
    time.sleep(0.3)
"""
    result = run_python(code, timeout=10.0)
    assert result.ok and result.seconds < 3.0  # the orphan holds stdout open for 3 s
    if "own process namespace" not in guard("children"):
        pytest.skip("no process namespace here: " + guard("children"))
    size = heartbeat.stat().st_size
    time.sleep(0.3)
    assert heartbeat.stat().st_size == size


def test_memory_bomb_dies_by_itself():
    if "limited for each process" not in guard("memory"):
        pytest.skip(guard("memory"))
    result = run_python("x = bytearray(400 << 20)\nprint(len(x))", memory_mb=256)
    assert result.returncode == 1 and "MemoryError" in result.stderr and not result.timed_out
    assert run_python("x = bytearray(100 << 20)\nprint(len(x))", memory_mb=256).ok


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_bomb_is_cut_and_killed(stream):
    result = run_python(f"import sys\nwhile True:\n    sys.{stream}.write('x' * 10_000)", timeout=20, output_limit=5000)
    assert result.truncated and not result.timed_out and not result.ok
    assert getattr(result, stream) == "x" * 5000
    assert result.seconds < 5.0


def test_output_of_exactly_the_limit_is_whole():
    result = run_python("import sys\nsys.stdout.write('x' * 5000)", output_limit=5000)
    assert result.ok and len(result.stdout) == 5000
    assert run_python("import sys\nsys.stdout.write('x' * 5001)", output_limit=5000).truncated


def test_big_file_is_refused():
    if "not limited" in guard("file size"):
        pytest.skip(guard("file size"))
    code = "with open('big', 'wb') as file:\n    file.write(b'x' * SIZE)"
    size = sandbox.FILE_LIMIT_MB << 20
    assert run_python(code.replace("SIZE", str(size))).ok
    result = run_python(code.replace("SIZE", str(size + 1)))
    assert not result.ok and "File too large" in result.stderr


def test_no_environment_variable_is_seen(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_USER", "42")
    seen = run_python("import os\nprint(sorted(os.environ))").stdout
    assert set(eval_names(seen)) <= {"LC_CTYPE", "SYSTEMROOT"}  # Python itself sets the first, Windows needs the second


def eval_names(printed_list):
    return [name for name in printed_list.strip("[]\n").replace("'", "").split(", ") if name]


def test_working_directory_is_temporary_and_gone_afterwards():
    code = "import os\nopen('a.txt', 'w').write('x')\nos.mkdir('d')\nos.chmod('d', 0)\nprint(os.getcwd())"
    folder = Path(run_python(code).stdout.strip())
    assert folder.is_absolute() and folder != Path.cwd()
    assert not folder.exists()


def test_interpreter_is_isolated_from_the_repository():
    assert "ModuleNotFoundError" in run_python("import model").stderr


def test_network_is_blocked_where_the_guard_says_so():
    if "not blocked" in guard("network"):
        pytest.skip(guard("network"))
    code = "import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=2)\nprint('connected')"
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()  # it does listen
        result = run_python(code.replace("PORT", str(server.getsockname()[1])))
    assert not result.ok and "connected" not in result.stdout


def test_death_by_signal_is_128_plus_its_number():
    if sys.platform == "win32":
        pytest.skip("signals are POSIX")
    assert run_python("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)").returncode == 128 + 9
    assert run_python("import os\nos.abort()").returncode == 128 + 6


@needs_posix
def test_everything_but_namespaces_holds_without_them(monkeypatch):
    monkeypatch.setattr(sandbox, "BOOTSTRAP", sandbox.BOOTSTRAP.replace("and isolate()", "and False"))
    active_guards.cache_clear()
    try:
        assert "not blocked" in guard("network") and "unless" in guard("children")
        assert run_python("while True:\n    pass", timeout=0.5).timed_out
        assert run_python("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)").returncode == 128 + 9
        assert run_python("import time\nimport os\nif os.fork() == 0:\n    time.sleep(60)", timeout=10.0).seconds < 3.0
    finally:
        active_guards.cache_clear()


def test_limits_must_be_positive():
    for bad in ({"timeout": 0}, {"memory_mb": -1}, {"output_limit": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            run_python("pass", **bad)


def test_results_from_threads_do_not_mix():
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: run_python(f"print({i})").stdout, range(24)))
    assert results == [f"{i}\n" for i in range(24)]


def test_command_line(tmp_path):
    file = tmp_path / "hello.py"
    file.write_text("print('你好')\nraise SystemExit(5)", encoding="utf-8")
    for command in (["-m", "model.sandbox", file], [ROOT / "model" / "sandbox.py", file]):
        finished = run_script(*command, env={"PYTHONIOENCODING": "utf-8"})
        assert finished.returncode == 1
        assert "network:" in finished.stdout and "file system: not blocked" in finished.stdout
        assert "你好\n" in finished.stdout and "exit code 5" in finished.stdout
    missing = run_script("-m", "model.sandbox", tmp_path / "no.py")
    assert missing.returncode == 2 and "Traceback" not in missing.stderr and "no.py" in missing.stderr


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```py\nx = 1\n```", "x = 1\n"),
        ("```Python\r\nx = 1\r\n```", "x = 1\n"),
        ("```\nshell?\n```\n```python\nx = 1\n```\n```python\nx = 2\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```bash\nls\n```", None),
        ("1. 如下\n   ```python\n   def f():\n       return 1\n   ```", "def f():\n    return 1\n"),
        ("```python\nx = '`'\nprint(x)", "x = '`'\nprint(x)"),
        ("def f():\n    return 1", "def f():\n    return 1\n"),
        ("import os", "import os\n"),
        ("Hello", None),
        ("你好", None),
        ("1 + 1", None),
        ("I am a model.", None),
        ("", None),
        ("x = 1\x00", None),
        ("(" * 10_000, None),
    ],
)
def test_extract_code(answer, code):
    assert extract_code(answer) == code
