"""A parallel `map` for big files: in order, in flat memory, by processes that start light and never outlive us.

The processes are spawned, as a fork of a process with threads may hang, but they do not import the caller's main
script. So it needs no `if __name__ == "__main__"`, and a worker loads what its job imports and not torch.

    with closing(map_in_processes(job, batches, count=4)) as results:   # closed early, it ends the processes
        for result in results: ...
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait


def map_in_processes(job: Callable, batches: Iterator, count: int) -> Iterator:
    """`map(job, batches)` by `count` processes: results in order, at most 2 * count batches on the way.

    Args:
        job: picklable; never returns a tuple. What it raises is raised here, in its place among the results.
        batches: an error of theirs (ValueError, OSError) is raised when the results before it were taken.

    Raises:
        ChildProcessError: a process died.
    """
    failure, sent, taken = None, 0, 0
    busy: dict[Connection, int] = {}  # the number of the batch that it works on
    done: dict[int, object] = {}
    with _started(job, count) as connections:
        idle = list(connections)
        while True:
            while idle and failure is None and sent - taken < 2 * count:
                try:
                    batch = next(batches)
                except (StopIteration, ValueError, OSError) as error:  # raised when the batches before it are done
                    failure = error
                    break
                connection = idle.pop()
                _send(connection, batch)
                busy[connection], sent = sent, sent + 1
            if taken in done:
                yield _result(done.pop(taken))
                taken += 1
            elif busy:
                for connection in wait(list(busy)):
                    done[busy.pop(connection)] = _receive(connection)
                    idle.append(connection)
            else:
                break
    if not isinstance(failure, StopIteration):
        raise failure


def _send(connection: Connection, batch: list) -> None:
    try:
        connection.send(batch)
    except OSError as error:
        raise _died() from error


def _receive(connection: Connection) -> object:
    try:
        return connection.recv()
    except (EOFError, OSError) as error:
        raise _died() from error


def _died() -> ChildProcessError:
    return ChildProcessError(
        "a process that tokenises ended without a result: its own message, if any, is above. If the system ended it "
        "for want of memory, close other programs, or let fewer processes work (taskset on Linux)"
    )


def _result(result: object) -> object:
    if isinstance(result, tuple):
        error, where = result
        raise error from RuntimeError(f"in a process that tokenises:\n{where}")
    return result


@contextmanager
def _started(job: Callable, count: int) -> Iterator[list[Connection]]:
    """Processes that do `job` for what they are sent; ended, in whatever way this is left."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    processes, connections = [], []
    try:
        with _without_main_module(), _interrupts_held_back():
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, job), daemon=True)
                process.start()
                theirs.close()  # so that only the process itself holds this end, and its death is seen
                processes.append(process)
                connections.append(ours)
        yield connections
    finally:
        for connection, process in zip(connections, processes, strict=True):
            connection.close()
            process.terminate()
        for process in processes:
            process.join()


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Started meanwhile, a process does not import the user's script: it may load torch, or train without a guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes that are started meanwhile never see a Ctrl-C, which goes to all of a terminal: we end them."""
    if sys.platform == "win32":
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # it would release the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, job: Callable) -> None:
    """What a process does: results, or (error, traceback), for batches, until the other end is closed or gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    with suppress(EOFError, OSError):
        while True:
            batch = connection.recv()
            try:
                result = job(batch)
            except Exception as error:  # whatever it is, it is raised where the results are wanted
                result = error, traceback.format_exc()
            connection.send(result)
