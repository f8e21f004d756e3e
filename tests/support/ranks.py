"""Ranks as threads of this process: a communicator for `SyncBatchNorm` without MPI, which records what was sent."""

# ruff: noqa: N802   the names are mpi4py's
import queue
import threading

PATIENCE = 60
"""Seconds until a rank that waits for a message fails."""


class Rank:
    """One of several ranks; `sent` has the receiver, or "all", and the bytes of every message of numbers."""

    def __init__(self, rank, boxes):
        self.rank, self.boxes, self.sent = rank, boxes, []

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return len(self.boxes)

    def put(self, message, dest):
        self.boxes[dest][self.rank].put(message)

    def get(self, source):
        return self.boxes[self.rank][source].get(timeout=PATIENCE)

    def allgather(self, sendobj):
        for dest in range(self.Get_size()):
            self.put(sendobj, dest)
        return [self.get(source) for source in range(self.Get_size())]

    def Allgather(self, sendbuf, recvbuf):
        self.sent.append(("all", sendbuf.nbytes))
        recvbuf[...] = self.allgather(sendbuf.copy())

    def Send(self, buf, dest):
        self.sent.append((dest, buf.nbytes))
        self.put(buf.copy(), dest)

    def Recv(self, buf, source):
        buf[...] = self.get(source)

    def Sendrecv(self, sendbuf, dest, _, recvbuf, source):
        self.Send(sendbuf, dest)
        self.Recv(recvbuf, source)


def together(ranks, program):
    """What `program(comm)` returned on each rank, or the exception that it raised there."""
    boxes = [[queue.SimpleQueue() for _ in range(ranks)] for _ in range(ranks)]
    results = [None] * ranks

    def run(rank):
        try:
            results[rank] = program(Rank(rank, boxes))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
