"""The processes that measure, and the one that calls them in turns.

- Each contestant has its own process, because OpenMP runtimes in one process disturb each other. It may run on as many
  processors as it has threads.
- Builds of batchnorm share a process, and thereby the arrays: where these lie in memory changes times by up to 20 %.
"""

import os
import signal
from multiprocessing import get_context


class Team:
    """The contestants' processes for one number of threads: a label and the arguments of `serve` for each."""

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
        """Figures by contestant, from all processes at once or one after the other."""
        if together:
            for pipe in self.pipes.values():
                pipe.send(request)
        found = {}
        for label in reversed(self.pipes) if backwards else self.pipes:
            found |= self.answer_of(label, request) if together else self.ask_one(label, *request)
        return found

    def close(self):
        for pipe in self.pipes.values():
            pipe.close()
        for process in self.processes:
            process.join()


def serve(pipe, threads, name, *about):
    """Check or time a pass of the contestants of `name` on request, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent process, which closes the pipe
    if hasattr(os, "sched_setaffinity"):  # the only limit that all contestants obey
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    from .contestants import Bout

    bout = Bout(name, threads, *about)
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        pipe.send(bout.answer(*request))
