"""The processes that measure, and the one that asks them in turns.

- Each contestant has a process of its own, because OpenMP runtimes in one process disturb each other. It may run on as
  many processors as it has threads.
- Another build of batchnorm lives in its process under the same name, `batchnorm`, from its own directory. Only the way
  of measuring, `batchnorm.profile`, is that of the batchnorm installed here, so that builds differ in nothing else.
- This module imports no batchnorm, because it is what chooses it.
"""

import os
import signal
import sys
from importlib.machinery import PathFinder
from multiprocessing import get_context


class Team:
    """The contestants' processes, for one number of threads: a label and what `serve` is told for each."""

    def __init__(self, members, threads):
        context = get_context("spawn")
        self.processes, self.pipes = [], {}
        for label, member in members.items():
            self.pipes[label], far = context.Pipe()
            process = context.Process(target=serve, args=(far, threads, *member), daemon=True)
            process.start()
            far.close()
            self.processes.append(process)

    def ask_one(self, label, *request):
        self.pipes[label].send(request)
        return self.answer_of(label, request)

    def answer_of(self, label, request):
        try:
            return self.pipes[label].recv()
        except (EOFError, ConnectionResetError):
            raise SystemExit(f"{label} has died at {request}") from None

    def ask(self, *request, together=False, backwards=False):
        """Figures by contestant, from all processes at once or from one after the other; a build has its label's."""
        if together:
            for pipe in self.pipes.values():
                pipe.send(request)
        found = {}
        for label in reversed(self.pipes) if backwards else self.pipes:
            answer = self.answer_of(label, request) if together else self.ask_one(label, *request)
            found |= answer if isinstance(answer, dict) else {label: answer}
        return found

    def close(self):
        for pipe in self.pipes.values():
            pipe.close()
        for process in self.processes:
            process.join()


class Build:
    """Finds another build of batchnorm, wherever the one installed here is and however it was installed."""

    def __init__(self, directory, profile):
        self.directory, self.profile = directory, profile

    def find_spec(self, name, path=None, _target=None):
        if name.partition(".")[0] != "batchnorm":
            return None
        places = {"batchnorm": [self.directory], "batchnorm.profile": [self.profile]}
        spec = PathFinder.find_spec(name, places.get(name, path))
        if spec is None:
            raise ModuleNotFoundError(f"{name} is not in {self.directory}", name=name)
        return spec


def serve(pipe, threads, name, directory=None, profile=None):
    """Check or time a pass of the contestants called `name` whenever asked to, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the asking process, and the pipe with it
    if hasattr(os, "sched_setaffinity"):  # the only limit that all of them obey
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if directory is not None:
        sys.meta_path.insert(0, Build(directory, profile))
    from .contestants import Bout

    bout = Bout(name, threads)
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        pipe.send(bout.answer(*request))
