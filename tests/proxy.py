"""A bad line: a TCP proxy on loopback between a shipper and a server, with the faults of one.

    with Proxy(server.port, bad(seed=1)) as line: ... line.port ...

What happens to a connection is decided when it is opened: `faults` is a function of the number of the connection that gives a `Fault`, or None for a good
one. `Proxy.up = False` closes the port altogether."""
import contextlib
import random
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass

KINDS = 'refuse', 'cut', 'lose_ack', 'throttle', 'hang', 'flip'


@dataclass(frozen=True)
class Fault:
    """`refuse`: reset at once; `throttle`: slow from the start. After `after` bytes of the client's: `cut` (and `throttle`, unless 0), `hang` (nobody hears
    anything any more), `lose_ack` (nothing comes back any more), `flip` (one bit)"""
    kind: str
    after: int = 0  # bytes that the client has sent by then
    rate: float = 0  # throttle: bytes a second, in each direction


def always(kind, after=0, rate=0.):
    "The same for every connection"
    return lambda n: Fault(kind, after, rate)


def bad(seed, most=300_000, rate=300_000, kinds=KINDS[:-1]):
    "No connection lives long: each ends by a fault of any kind, anywhere in its first `most` bytes (half of them in the first 5,000)"
    rng, lock = random.Random(seed), threading.Lock()
    def fault(n):
        with lock: return Fault(rng.choice(kinds), 1 + int(rng.uniform(0, rng.choice((5_000, most)))), rate)
    return fault


def _reset(s):
    "Closes with RST, as a line does that is gone"
    with contextlib.suppress(OSError): s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    with contextlib.suppress(OSError): s.shutdown(socket.SHUT_RDWR)
    s.close()


class Proxy:
    def __init__(self, target, faults=lambda n: None, port=0):
        self.target, self.faults, self.port, self.seen, self.n = target, faults, port, Counter(), 0
        self._listener, self._open, self._lock = None, set(), threading.Lock()

    def __enter__(self):
        self.up = True
        return self

    def __exit__(self, *_): self.up = False

    @property
    def up(self): return self._listener is not None

    @up.setter
    def up(self, yes):
        if yes and not self._listener:
            s = socket.socket()
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(('127.0.0.1', self.port))
            s.listen(64)
            self.port, self._listener = s.getsockname()[1], s
            threading.Thread(target=self._accept, args=(s,), daemon=True).start()
        elif not yes and self._listener:
            s, self._listener = self._listener, None
            with contextlib.suppress(OSError): s.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            s.close()
            self.drop()

    def drop(self):
        "Cuts every connection that is open"
        with self._lock: open_, self._open = self._open, set()
        for s in open_: _reset(s)

    def _accept(self, listener):
        while True:
            try: client, _ = listener.accept()
            except OSError: return
            self.n += 1
            threading.Thread(target=self._serve, args=(client, self.faults(self.n)), daemon=True).start()

    def _serve(self, client, fault):
        kind = fault.kind if fault else 'none'
        if kind == 'refuse' or not fault or not fault.after: self.seen[kind] += 1  # the others count when they strike
        try: server = socket.create_connection(('127.0.0.1', self.target), 10) if kind != 'refuse' else None
        except OSError: server = None
        if server is None: return _reset(client)
        for s in (client, server):
            s.settimeout(None)
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock: self._open |= {client, server}
        line = _Line(client, server, fault, self)
        back = threading.Thread(target=line.back, daemon=True)
        back.start()
        line.forth()
        back.join()
        with self._lock: self._open -= {client, server}


class _Line:
    "One connection"
    def __init__(self, client, server, fault, proxy):
        self.client, self.server, self.fault, self.proxy, self.sent, self.struck = client, server, fault, proxy, 0, False

    def kind(self): return self.fault.kind if self.fault else ''

    def strike(self):
        if not self.struck and self.fault.after: self.proxy.seen[self.fault.kind] += 1
        self.struck = True

    def slow(self, n):
        if self.kind() == 'throttle': time.sleep(n / self.fault.rate)

    def forth(self):
        while True:
            try: data = self.client.recv(8192)
            except OSError: data = b''
            if not data: break
            before, self.sent = self.sent, self.sent + len(data)
            if self.fault and self.sent > self.fault.after and (self.kind() != 'throttle' or self.fault.after):
                at = max(0, self.fault.after - before)
                if self.kind() in ('cut', 'throttle'): data = data[:at]
                elif self.kind() == 'flip' and not self.struck: data = data[:at] + bytes([data[at] ^ 16]) + data[at + 1:]
                self.strike()
                if self.kind() == 'hang': continue  # read and forgotten; the server waits as well
            self.slow(len(data))
            try: self.server.sendall(data)
            except OSError: break
            if self.struck and self.kind() in ('cut', 'throttle'): break
        self.end()

    def back(self):
        while True:
            try: data = self.server.recv(8192)
            except OSError: data = b''
            if not data: break
            if self.struck and self.kind() == 'hang': continue
            if self.struck and self.kind() == 'lose_ack':
                time.sleep(.05)  # the server has said yes; nobody hears it
                break
            self.slow(len(data))
            try: self.client.sendall(data)
            except OSError: break
        self.end()

    def end(self):
        for s in (self.client, self.server): _reset(s) if self.struck else self._close(s)

    def _close(self, s):
        with contextlib.suppress(OSError): s.shutdown(socket.SHUT_RDWR)
        s.close()
